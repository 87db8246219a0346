/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Types that user space reads from the object's BTF and that no map or function refers to: the compiler would leave them
 * out. Each is named by a pointer that nobody uses.
 */
#pragma once
#include "maps.h"
#include "drop.h"

#define EXPORT(type, name) const type *const export_##name __attribute__((used)) = 0

EXPORT(struct event, event);
EXPORT(enum drop_reason, drop_reason);
EXPORT(enum direction, direction);
EXPORT(enum endpoint_option, endpoint_option);
EXPORT(enum local_addr_flag, local_addr_flag);
EXPORT(enum ipcache_flag, ipcache_flag);
EXPORT(enum scope, scope);
EXPORT(enum row_verdict, row_verdict);
EXPORT(enum ct_leg, ct_leg);
EXPORT(enum ct_flag, ct_flag);
EXPORT(enum nat_dir, nat_dir);
EXPORT(enum frontend_scope, frontend_scope);
EXPORT(enum frontend_flag, frontend_flag);
EXPORT(enum backend_flag, backend_flag);
EXPORT(enum translation_dir, translation_dir);
EXPORT(enum translation_flag, translation_flag);
EXPORT(enum event_type, event_type);
EXPORT(enum event_verdict, event_verdict);
EXPORT(enum observation, observation);
EXPORT(enum ct_state, ct_state);
