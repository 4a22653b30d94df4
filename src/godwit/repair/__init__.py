# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP_REPAIR by proxy.

Setting TCP_REPAIR on a socket needs CAP_NET_ADMIN, which a back-end does not
have. A helper has it and nothing else: it gets sockets over a UNIX socket, sets
the mode and answers. The protocol is that of ``passt-repair``, so that either
program's helper serves either back-end.
"""

from godwit.repair.client import RepairClient, RepairListener, in_repair
from godwit.repair.protocol import Repair, RepairError

__all__ = ["Repair", "RepairClient", "RepairError", "RepairListener", "in_repair"]
