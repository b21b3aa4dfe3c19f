#!/bin/sh
# Takes out of a Debian system with Python what a container of ours never needs; in the build of the
# image, as root, and never anywhere else: afterwards nothing can be installed there any more.
#
# Taken: every package of the list that is there, and at last dpkg itself; pip; the setuid and setgid
# bits of what is left. dpkg's status file stays, without them: scanners read what is installed there.
set -eu

# A package goes only with all that need it, so the list is closed: docker/Dockerfile's build fails at
# the last lines if one of the programs named there is left.
unwanted="adduser apt apt-utils build-essential cpp debconf debconf-i18n debian-archive-keyring \
e2fsprogs e2fslibs fdisk gcc gpgv g++ init-system-helpers libapt-pkg6.0 liblocale-gettext-perl libtext-charwidth-perl \
libtext-iconv-perl libtext-wrapi18n-perl login logsave make mount passwd perl perl-base \
python3-pip python3-pip-whl python3-setuptools python3-setuptools-whl python3-venv python3.11-venv \
sysvinit-utils tzdata-legacy usrmerge util-linux util-linux-extra whiptail libnewt0.52"

here=""
for package in $unwanted; do
  if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ]; then
    here="$here $package"
  fi
done
# Their own scripts want Perl and debconf, which go too; what they would undo lies outside the image.
for package in $here; do rm -f "/var/lib/dpkg/info/$package".*rm "/var/lib/dpkg/info/$package:"*rm; done
# shellcheck disable=SC2086 # a list of words
dpkg --purge --force-all $here >/tmp/purge.log 2>&1 || { cat /tmp/purge.log && exit 1; }
rm /tmp/purge.log

# dpkg cannot take itself away: its files by its own list (not folders, nor links to them such as /lib),
# its entry by hand
while read -r path; do [ -d "$path" ] || rm -f "$path"; done </var/lib/dpkg/info/dpkg.list
awk 'BEGIN { RS = ""; ORS = "\n\n" } $0 !~ /^Package: dpkg\n/' /var/lib/dpkg/status >/tmp/status
mv /tmp/status /var/lib/dpkg/status
chmod 644 /var/lib/dpkg/status
find /var/lib/dpkg -mindepth 1 -maxdepth 1 ! -name status -exec rm -r {} +

# Docker's own image python has pip beside the standard library, and the wheels to make it anew
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
rm -rf "$stdlib/ensurepip" /usr/share/python-wheels /usr/local/bin/pip* /usr/local/bin/wheel
for name in pip setuptools wheel; do
  rm -rf "$stdlib/site-packages/$name" "$stdlib/site-packages/$name"-*.dist-info
done
rm -rf /etc/apt /var/lib/apt /var/cache/apt /var/cache/debconf /usr/share/perl5 /usr/lib/*/perl* /var/log/*

find / -xdev -type f -perm /6000 -exec chmod a-s {} +

hash -r # what the shell remembers of programs that are gone
for program in apt apt-get dpkg dpkg-deb perl pip pip3 gcc cc g++ c++ as ld make su passwd mount; do
  if command -v "$program" >/dev/null; then
    echo "strip: $program is still there" >&2
    exit 1
  fi
done
