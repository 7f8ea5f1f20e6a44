"""What a topology will do before it is run: measured costs, and a simulation of its nodes and links."""
