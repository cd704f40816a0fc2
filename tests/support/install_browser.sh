#!/bin/sh
# The web page is tested in a real browser: finds one, or installs it where that can be done without asking. Never fails:
# without a browser the tests of the page are skipped, and their reason says what to install.
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "make: no browser; the web page is not tested. Install the packages chromium and chromium-driver" >&2
  exit 0
fi
echo "make: installing chromium, which the web page is tested in"
{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver; } \
  >/dev/null 2>&1 || echo "make: apt-get could not install chromium and chromium-driver; the web page is not tested" >&2
