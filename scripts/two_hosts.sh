#!/usr/bin/env bash
# Two hosts train one student: two network namespaces, each with an address of its own, joined by a cable. Needs root.
#   scripts/two_hosts.sh recipes/demo.yaml --stage1.steps 4 --stage2.steps 0 --output_dir /tmp/two-hosts
# On real hosts the same torchrun line runs on each, with its own --node_rank and the first one's address.
set -euo pipefail
python=${PYTHON:-python}
tag=rc$$
clean() {
    kill "${first:-}" 2>/dev/null || true
    for n in 0 1; do ip netns delete "$tag-$n" 2>/dev/null || true; done
}
trap clean EXIT

for n in 0 1; do ip netns add "$tag-$n"; done
ip link add "$tag-a" netns "$tag-0" type veth peer name "$tag-b" netns "$tag-1"
ip -n "$tag-0" address add 10.77.0.1/24 dev "$tag-a"
ip -n "$tag-1" address add 10.77.0.2/24 dev "$tag-b"
for end in "0 $tag-a" "1 $tag-b"; do
    read -r n device <<<"$end"
    ip -n "$tag-$n" link set lo up
    ip -n "$tag-$n" link set "$device" up
done

host() { # host N DEVICE ARGS...: one host's part of the run
    local n=$1 device=$2
    shift 2
    exec env GLOO_SOCKET_IFNAME="$device" OMP_NUM_THREADS=1 ip netns exec "$tag-$n" "$python" -m torch.distributed.run \
        --nnodes 2 --nproc_per_node 1 --node_rank "$n" --master_addr 10.77.0.1 --master_port 29500 \
        -m refine_control distill "$@"
}
host 0 "$tag-a" "$@" &
first=$!
(host 1 "$tag-b" "$@")
wait "$first"
