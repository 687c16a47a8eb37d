#!/usr/bin/env bash
# Build docker/Dockerfile.cpu and convert in it, on a machine with neither an engine nor a registry.
#
#   docker/prove.sh      # as root, with buildah and debootstrap; minutes, and several GB under TMPDIR
#
# A Debian of minbase plus Python stands in for the base image, which is the only thing that this
# does not prove. buildah runs the steps in a chroot. What pip is told on this machine (indexes,
# wheels, certificates) is mounted while building; empty mount points are all that stays of it.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d "${TMPDIR:-/tmp}/splatshard-prove.XXXXXX")
export BUILDAH_ISOLATION=chroot
# none of the machine's own storage: this root is its own and ends with the script
buildah() {
    command buildah --storage-driver vfs --root "$work/storage" --runroot "$work/run" "$@"
}
clean() {
    buildah umount --all >&2 || true
    buildah rm --all > /dev/null || true
    # a mount left behind would lead rm out of the folder
    if grep -qF " $work/" /proc/self/mountinfo; then
        echo "mounts left under $work" >&2
    else
        rm -rf "$work"
    fi
}
trap clean EXIT

step() { printf '\n== %s\n' "$*"; }

step "base image: Debian bookworm with Python"
container=$(buildah from scratch)
root=$(buildah mount "$container")
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$root" \
    > "$work/log" || { tail "$work/log"; exit 1; }
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
buildah umount "$container" > /dev/null
buildah commit --quiet --rm "$container" localhost/debian-python > /dev/null

step "docker/Dockerfile.cpu"
# pip's settings as one file, and a read-only mount for each local path that they name
python3 -m pip config list | python3 -c '
import re, sys
settings = dict(re.findall(r"^[^\n=]*\.([\w-]+)=.(.*).$", sys.stdin.read(), re.M))
print("[global]", *(f"{k} = {v}" for k, v in settings.items()), sep="\n")
paths = re.findall(r"(?:^|\s|file://)(/\S+)", "\n".join(settings.values()))
print(*{re.sub(r"/simple/?$", "", p) for p in paths}, sep="\n", file=sys.stderr)
' > "$work/pip.conf" 2> "$work/paths"
mounts=(--volume "$work/pip.conf:/etc/pip.conf:ro")
while read -r path; do
    if [ -e "$path" ]; then mounts+=(--volume "$path:$path:ro"); fi
done < "$work/paths"
buildah bud "${mounts[@]}" --build-arg BASE=localhost/debian-python \
    --build-arg TORCH_INDEX="${TORCH_INDEX:-}" \
    --file docker/Dockerfile.cpu --tag localhost/splatshard:cpu . \
    > "$work/log" 2>&1 || { tail -n 40 "$work/log"; exit 1; }

step "two pictures, converted by the image's own user and by another"
for user in 1000 4321; do
    container=$(buildah from localhost/splatshard:cpu)
    buildah run --user "$user" "$container" -- bash -leuc '
        id
        cd "$(mktemp -d)"
        python -c "
from PIL import Image
for angle in 30, 120:
    Image.linear_gradient(\"L\").rotate(angle).convert(\"RGB\").save(f\"{angle}.png\")
"
        convert="splatshard convert . splats --steps=20 --num-gaussians=64 --workers=1"
        $convert
        splatshard verify splats
        $convert 2>&1 | grep "everything is already done"
        ray --version
    '
    buildah rm "$container" > /dev/null
done

step "the image"
buildah inspect --format 'user {{.OCIv1.Config.User}}, command {{.OCIv1.Config.Cmd}}{{"\n"}}' \
    localhost/splatshard:cpu
buildah images --format '{{.Name}}:{{.Tag}} {{.Size}}'
