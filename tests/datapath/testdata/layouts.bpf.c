/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The product's maps without its programs: layouts for the reconcilers' tests. */
#include <linux/pkt_cls.h>
#include "lib/maps.h"
#include "lib/config.h"
#include "lib/drop.h"
#include "lib/export.h"

SEC("tc")
int nothing(struct __sk_buff *skb __attribute__((unused)))
{
	return TC_ACT_OK;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
