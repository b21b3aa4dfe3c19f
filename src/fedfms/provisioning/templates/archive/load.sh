#!/bin/sh
# Checks this archive and loads its images into Docker. Needs no network; a second run does no harm.
set -eu
cd "$(dirname "$0")"

if ! docker info >/dev/null 2>&1; then
  echo "load: Docker does not answer" >&2
  echo "  fix: start it, or run this as a user who may use it (docker info says why)" >&2
  exit 69
fi

echo "checking the checksums"
if ! sha256sum --quiet -c SHA256SUMS; then
  echo "load: the archive is damaged or was changed; nothing was loaded" >&2
  echo "  fix: copy it again, or ask the sender" >&2
  exit 65
fi

for image in images/*.tar.gz; do
  # sha256sum looks at the files that the list names, and at no other
  if ! grep -qxE "[0-9a-f]{64}  $image" SHA256SUMS; then
    echo "load: SHA256SUMS does not name $image; nothing was loaded" >&2
    echo "  fix: delete it if it is yours, or ask the sender" >&2
    exit 65
  fi
done

for image in images/*.tar.gz; do
  docker load -i "$image"
done

echo "loaded. Next, for the kit that is yours:"
for kit in kits/*.zip; do
  [ -f "$kit" ] || continue
  name=$(basename "$kit" .zip)
  echo "  unzip $kit -d .. && cd ../$name"
done
for checkpoint in checkpoints/*; do
  [ -f "$checkpoint" ] || continue
  echo "  put $checkpoint into the kit's checkpoints/"
done
echo "  then follow its README.md: .env, site.yml, ./check-site, docker compose up -d"
