#!/bin/sh
# two-hosts: run this on gpu0 (10.0.0.1), then `tmux attach -t two-hosts`.
set -eu
folder=$(mktemp -d)
cat >"$folder/two-hosts.yaml" <<'TOPOLOGY'
THE TOPOLOGY
TOPOLOGY
tmux new-session -d -s two-hosts -n gpu0 \
    "/opt/ddrl/bin/ddrl-node -t '$folder/two-hosts.yaml' --host gpu0; rm -r '$folder'; exec sh"
tmux new-window -d -t two-hosts: -n cpu1 'ssh -t 10.0.0.2 '"'"'/opt/ddrl/bin/ddrl-node --join tcp://10.0.0.1:7077 --host cpu1'"'"'; exec sh'
