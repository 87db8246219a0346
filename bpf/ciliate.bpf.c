// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The datapath of a node, one translation unit: one program a hook, so a generation of programs cannot be half swapped.
 * See docs/adr/0002-every-way-into-and-out-of-a-pod.md for which packet meets which program.
 */
#include "hooks/pod.h"
#include "hooks/host.h"
#include "hooks/overlay.h"
#include "hooks/netdev.h"
#include "hooks/netdev_out.h"
#include "hooks/netdev_xdp.h"
#include "hooks/sock.h"
#include "lib/export.h"

char _license[] SEC("license") = "Dual BSD/GPL";
