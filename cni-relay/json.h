/* SPDX-License-Identifier: Apache-2.0 */
/* As much JSON (RFC 8259) as the relay needs: writing strings, and reading fields of an object. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

struct text {
	char *at; /* ends with a zero octet that `length` does not count */
	size_t length, room;
};

/* Appends octets; never fails (the process ends when there is no memory). */
void text_add(struct text *to, const char *octets, size_t length);
void text_puts(struct text *to, const char *string);
void text_free(struct text *text);

/* Appends a JSON string. False: the octets are not UTF-8. */
bool json_string(struct text *to, const char *octets, size_t length);

/* What became of a look for a field of an object. INVALID: no object, not valid that far, or a value of another kind. */
enum json_field { JSON_ABSENT, JSON_FOUND, JSON_INVALID };

enum json_field json_string_field(const char *document, size_t length, const char *name, struct text *value);
/* A whole number of at most 15 digits. */
enum json_field json_number_field(const char *document, size_t length, const char *name, long *value);
