/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The registry of skb->mark values and of ip-rule priorities; nothing else in the project may choose one.
 *
 *   mark & 0xf00 == 0x200   to the proxy: delivered locally by the rule below
 *   mark & 0xf00 == 0xa00   from the proxy to a server (set by its socket): policy was enforced by the redirect
 *   mark & 0xf00 == 0x400   leaves the node: judged by the hook that sent it on, `to_netdev` looks no further
 *
 *   ip rule priority 9, fwmark 0x200/0xf00, table 2004: "local default dev lo", for both families
 */
#pragma once

#define MARK_MASK 0xf00
#define MARK_TO_PROXY 0x200
#define MARK_JUDGED 0x400
#define MARK_FROM_PROXY 0xa00
