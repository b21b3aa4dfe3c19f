#!/bin/sh
# Checks this archive and loads its images into Docker. Needs no network; a second run does no harm.
#
#   sh load.sh WORD     the SHA-256 of SHA256SUMS or, of a signed archive, the fingerprint of the
#                       certificate authority (SHA256:…), as the coordinator tells it by telephone
#   sh load.sh KIT      the folder of a kit that you have already; for a signed archive
#   sh load.sh          without either, which only an archive that is not signed allows
set -eu

trusted=${1:-}
if [ -d "$trusted" ]; then trusted=$(cd "$trusted" && pwd); fi
cd "$(dirname "$0")"

refuse() {
  echo "load: $1; nothing was loaded" >&2
  echo "  fix: $2" >&2
  exit "${3:-65}"
}

# In small letters, without the colons of a fingerprint and the word before it.
plain() { printf '%s' "$1" | tr 'A-F' 'a-f' | sed 's/^[Ss][Hh][Aa]256://; s/://g'; }

if ! docker info >/dev/null 2>&1; then
  echo "load: Docker does not answer" >&2
  echo "  fix: start it, or run this as a user who may use it (docker info says why)" >&2
  exit 69
fi

sum=$(sha256sum SHA256SUMS | cut -d ' ' -f 1)
echo "this archive: the SHA-256 of its SHA256SUMS is $sum"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Whether SHA256SUMS is signed with the key of a certificate.
signed_by() {
  [ -f SHA256SUMS.sig ] || return 1
  openssl x509 -in "$1" -noout -pubkey >"$scratch/key" 2>/dev/null || return 1
  base64 -d SHA256SUMS.sig >"$scratch/signature" 2>/dev/null || return 1
  openssl dgst -sha256 -verify "$scratch/key" -signature "$scratch/signature" SHA256SUMS >/dev/null 2>&1
}

need_openssl() {
  command -v openssl >/dev/null ||
    refuse "there is no openssl to check the signature with" \
      "install it, or give the SHA-256 of SHA256SUMS as the coordinator tells it" 69
}

if [ "$(plain "$trusted")" = "$sum" ]; then
  echo "it is the one that you were told"
elif [ -n "$trusted" ]; then
  need_openssl
  certificate=rootCA.pem
  if [ -d "$trusted" ]; then
    for certificate in "$trusted/startup/rootCA.pem" "$trusted/kit/startup/rootCA.pem"; do
      [ ! -f "$certificate" ] || break
    done
    [ -f "$certificate" ] || refuse "$trusted is no kit" "name the folder that was unzipped, or its kit/" 66
  else
    [ -f rootCA.pem ] || refuse "this archive is another than you were told, and it is not signed" \
      "ask the sender for the SHA-256 of SHA256SUMS by telephone, and for the archive again"
    fingerprint=$(openssl x509 -in rootCA.pem -noout -fingerprint -sha256 2>/dev/null | sed 's/.*=//')
    [ "$(plain "$trusted")" = "$(plain "$fingerprint")" ] ||
      refuse "this archive is another than you were told, or signed by another: SHA256:$fingerprint" \
        "ask the coordinator by telephone what fedfms provision and fedfms archive print; if it differs, somebody exchanged the archive"
  fi
  signed_by "$certificate" || refuse "SHA256SUMS is not signed by that certificate authority" \
    "ask the sender for the archive again; it was changed, or is not signed"
  echo "its signature is good"
elif [ -f SHA256SUMS.sig ]; then
  refuse "this archive is signed, and nobody said whose signature counts" \
    "sh load.sh SHA256:AB:CD:..., the fingerprint that the coordinator tells by telephone; or sh load.sh KIT, with a kit that you have" 64
else
  echo "it is not signed: compare this with what the sender tells by another way"
fi

echo "checking the checksums"
if ! sha256sum --quiet --strict -c SHA256SUMS; then
  echo "load: the archive is damaged or was changed; nothing was loaded" >&2
  echo "  fix: copy it again, or ask the sender" >&2
  exit 65
fi

# sha256sum looks at the files that the list names, and at no other
cut -c 67- SHA256SUMS >"$scratch/named"
find images kits checkpoints bills ! -type d >"$scratch/there"
if grep -vxF -f "$scratch/named" "$scratch/there" >"$scratch/added"; then
  refuse "SHA256SUMS does not name $(head -n 1 "$scratch/added")" "delete it if it is yours, or ask the sender"
fi

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
