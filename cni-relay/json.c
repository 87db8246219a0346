/* SPDX-License-Identifier: Apache-2.0 */
#include "json.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH_MAX 128

void text_add(struct text *to, const char *octets, size_t length)
{
	if (to->length + length + 1 > to->room) {
		to->room = (to->length + length + 1) * 2;
		to->at = realloc(to->at, to->room);
		if (!to->at) {
			fputs("ciliate-cni: out of memory\n", stderr);
			exit(1);
		}
	}
	if (length)
		memcpy(to->at + to->length, octets, length);
	to->length += length;
	to->at[to->length] = 0;
}

void text_puts(struct text *to, const char *string)
{
	text_add(to, string, strlen(string));
}

void text_free(struct text *text)
{
	free(text->at);
	*text = (struct text){ 0 };
}

/* Octets of the UTF-8 sequence (RFC 3629) that starts here, 0: none. */
static size_t utf8_length(const unsigned char *s, size_t left)
{
	size_t n = s[0] < 0x80                 ? 1 :
		   s[0] >= 0xc2 && s[0] < 0xe0 ? 2 :
		   (s[0] & 0xf0) == 0xe0       ? 3 :
		   s[0] >= 0xf0 && s[0] < 0xf5 ? 4 :
						 0;

	if (!n || n > left)
		return 0;
	for (size_t i = 1; i < n; i++)
		if ((s[i] & 0xc0) != 0x80)
			return 0;
	if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) || (s[0] == 0xf0 && s[1] < 0x90) ||
	    (s[0] == 0xf4 && s[1] > 0x8f))
		return 0;
	return n;
}

bool json_string(struct text *to, const char *octets, size_t length)
{
	const unsigned char *s = (const unsigned char *)octets;
	char escape[8];

	text_puts(to, "\"");
	for (size_t i = 0, n; i < length; i += n) {
		n = utf8_length(s + i, length - i);
		if (!n)
			return false;
		if (n == 1 && (s[i] < 0x20 || s[i] == '"' || s[i] == '\\')) {
			snprintf(escape, sizeof(escape), "\\u%04x", s[i]);
			text_puts(to, escape);
		} else {
			text_add(to, octets + i, n);
		}
	}
	text_puts(to, "\"");
	return true;
}

struct reader {
	const char *at, *end;
};

static void skip_space(struct reader *r)
{
	while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r'))
		r->at++;
}

static bool take(struct reader *r, char c)
{
	skip_space(r);
	if (r->at >= r->end || *r->at != c)
		return false;
	r->at++;
	return true;
}

static bool read_hex(struct reader *r, uint32_t *value)
{
	*value = 0;
	for (int i = 0; i < 4; i++, r->at++) {
		int c = r->at < r->end ? *r->at : 0;
		int digit = c >= '0' && c <= '9' ? c - '0' :
			    c >= 'a' && c <= 'f' ? c - 'a' + 10 :
			    c >= 'A' && c <= 'F' ? c - 'A' + 10 :
						   -1;

		if (digit < 0)
			return false;
		*value = *value << 4 | (uint32_t)digit;
	}
	return true;
}

static void put_utf8(struct text *to, uint32_t c)
{
	char out[4];
	size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
	static const unsigned char lead[] = { 0, 0, 0xc0, 0xe0, 0xf0 };

	for (size_t i = n; i-- > 1; c >>= 6)
		out[i] = (char)(0x80 | (c & 0x3f));
	out[0] = (char)(lead[n] | c);
	text_add(to, out, n);
}

/* \uXXXX, two of them for a surrogate pair (RFC 8259, 7). */
static bool read_unicode(struct reader *r, struct text *to)
{
	uint32_t c, low;

	if (!read_hex(r, &c))
		return false;
	if (c >= 0xdc00 && c < 0xe000)
		return false;
	if (c >= 0xd800 && c < 0xdc00) {
		if (r->end - r->at < 6 || r->at[0] != '\\' || r->at[1] != 'u')
			return false;
		r->at += 2;
		if (!read_hex(r, &low) || low < 0xdc00 || low >= 0xe000)
			return false;
		c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
	}
	put_utf8(to, c);
	return true;
}

static bool read_string(struct reader *r, struct text *to)
{
	static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";

	if (!take(r, '"'))
		return false;
	text_add(to, "", 0);
	while (r->at < r->end && *r->at != '"') {
		const char *known;

		if (*r->at != '\\') {
			text_add(to, r->at++, 1);
			continue;
		}
		if (++r->at >= r->end)
			return false;
		if (*r->at == 'u') {
			r->at++;
			if (!read_unicode(r, to))
				return false;
			continue;
		}
		known = memchr(from, *r->at, sizeof(from) - 1);
		if (!known)
			return false;
		text_add(to, into + (known - from), 1);
		r->at++;
	}
	return take(r, '"');
}

/* Passes over one value of any kind. */
static bool skip_value(struct reader *r, int depth)
{
	struct text ignored = { 0 };
	char close;
	bool ok;

	skip_space(r);
	if (r->at >= r->end || depth > DEPTH_MAX)
		return false;
	if (*r->at == '"') {
		ok = read_string(r, &ignored);
		text_free(&ignored);
		return ok;
	}
	if (*r->at != '{' && *r->at != '[') {
		const char *start = r->at;

		while (r->at < r->end && !strchr(",]} \t\r\n", *r->at))
			r->at++;
		return r->at > start;
	}
	close = *r->at++ == '{' ? '}' : ']';
	if (take(r, close))
		return true;
	do {
		if (close == '}') {
			ok = read_string(r, &ignored);
			text_free(&ignored);
			if (!ok || !take(r, ':'))
				return false;
		}
		if (!skip_value(r, depth + 1))
			return false;
	} while (take(r, ','));
	return take(r, close);
}

/* Moves to the value of a field of the object, the first one of that name. */
static enum json_field find_field(struct reader *r, const char *name)
{
	struct text key = { 0 };

	if (!take(r, '{'))
		return JSON_INVALID;
	if (take(r, '}'))
		return JSON_ABSENT;
	do {
		bool found, ok = read_string(r, &key);

		found = ok && key.length == strlen(name) && !memcmp(key.at, name, key.length);
		text_free(&key);
		if (!ok || !take(r, ':'))
			return JSON_INVALID;
		if (found) {
			skip_space(r);
			return JSON_FOUND;
		}
		if (!skip_value(r, 0))
			return JSON_INVALID;
	} while (take(r, ','));
	return take(r, '}') ? JSON_ABSENT : JSON_INVALID;
}

enum json_field json_string_field(const char *document, size_t length, const char *name, struct text *value)
{
	struct reader r = { document, document + length };
	enum json_field found = find_field(&r, name);

	if (found != JSON_FOUND || read_string(&r, value))
		return found;
	text_free(value);
	return JSON_INVALID;
}

enum json_field json_number_field(const char *document, size_t length, const char *name, long *value)
{
	struct reader r = { document, document + length };
	enum json_field found = find_field(&r, name);
	char digits[17] = { 0 };
	size_t n = 0;
	char *end;

	if (found != JSON_FOUND)
		return found;
	while (r.at < r.end && n < sizeof(digits) - 1 && (*r.at == '-' || (*r.at >= '0' && *r.at <= '9')))
		digits[n++] = *r.at++;
	skip_space(&r);
	if (!n || n == sizeof(digits) - 1 || r.at == r.end || (*r.at != ',' && *r.at != '}'))
		return JSON_INVALID;
	*value = strtol(digits, &end, 10);
	return *end ? JSON_INVALID : JSON_FOUND;
}
