# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests with virtual machines need besides QEMU: a guest image, passt, and libvirt.

``python -m godwit.lab.setup_vm`` (``make vm-tools``) sees that all are there.
passt, and libvirt with the QEMU that belongs to it, are fetched into the cache
(`peer`, `overlay`) and not installed. QEMU itself is installed with the other
prerequisites (``tools/prerequisites vm``).
"""

from __future__ import annotations

import sys

from godwit.lab import image, overlay, peer, qemu
from godwit.lab.errors import LabError


def main() -> int:
    """Fetch and build what is missing."""
    try:
        qemu.version()
        image.build()
        peer.fetch()
        overlay.fetch()
    except LabError as error:
        sys.stderr.write(f"vm-tools: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
