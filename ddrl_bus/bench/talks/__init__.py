"""Two processes talking through one library or another, a file each: what `ddrl bench peers` compares."""
