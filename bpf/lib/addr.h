/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* One address form for both families: IPv6 as it is, IPv4 as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2).
 * Every map that holds an address holds this one, so there is one code path for both families.
 */
#pragma once
#include <linux/types.h>

union addr {
	__u8 b[16];
	__be32 w[4];
	__u64 d[2];
};

/* Prefix length of the IPv4-mapped range: an IPv4 /n is a /(96 + n) here. */
#define ADDR_V4_PREFIX 96
