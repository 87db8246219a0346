/* SPDX-License-Identifier: Apache-2.0 */
/* ciliate-cni: the CNI plugin's executable. It relays its input to the agent of the node, which has the logic: a node's
 * host may have no Python. While the agent restarts, the call waits, up to a limit.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include "json.h"

#define DEFAULT_SOCKET "/run/ciliate/ciliate.sock"
#define DEFAULT_TIMEOUT 60 /* seconds */
#define INPUT_MAX (1 << 20)
#define ANSWER_MAX (4 << 20)
#define FIRST_PAUSE 20 /* milliseconds */
#define LAST_PAUSE 500

enum cni_error { CNI_ENVIRONMENT = 4, CNI_IO = 5, CNI_DECODE = 6, CNI_LATER = 11 };

/* What became of one attempt. `REFUSED`: the agent has not seen the request, so it may be sent again. */
enum attempt { ANSWERED, REFUSED, BROKEN };

static const char *variables[] = { "CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS",         "CNI_IFNAME",
				   "CNI_ARGS",    "CNI_PATH",        "CNI_NETNS_OVERRIDE" };

static long long now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Prints an error as the CNI specification wants it. */
static int fail(int code, const char *message, const char *details)
{
	struct text out = { 0 };
	char head[64];

	snprintf(head, sizeof(head), "{\"cniVersion\":\"1.1.0\",\"code\":%d,\"msg\":", code);
	text_puts(&out, head);
	json_string(&out, message, strlen(message));
	text_puts(&out, ",\"details\":");
	if (!json_string(&out, details, strlen(details)))
		text_puts(&out, "\"");
	text_puts(&out, "}\n");
	fputs(out.at, stdout);
	text_free(&out);
	return 1;
}

static int usage(void)
{
	fputs("ciliate-cni is a CNI plugin: a container runtime calls it with CNI_COMMAND and a configuration on\n"
	      "standard input. It relays the call to the Ciliate agent of this node (ciliated).\n\n"
	      "Its configuration may have, beside \"type\": \"ciliate-cni\":\n"
	      "  \"agentSocket\"   the agent's socket (default: $CILIATE_SOCKET, else " DEFAULT_SOCKET ")\n"
	      "  \"agentTimeout\"  how long to wait while the agent restarts, in seconds (default: 60)\n",
	      stderr);
	return 2;
}

/* Reads all of a descriptor; false: an error or more than `max` octets. */
static bool read_all(int fd, struct text *to, size_t max)
{
	char chunk[16384];
	ssize_t n;

	text_add(to, "", 0);
	while ((n = read(fd, chunk, sizeof(chunk))) != 0) {
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 || to->length + (size_t)n > max)
			return false;
		text_add(to, chunk, (size_t)n);
	}
	return true;
}

static bool write_all(int fd, const char *octets, size_t length)
{
	while (length) {
		ssize_t n = send(fd, octets, length, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		octets += n;
		length -= (size_t)n;
	}
	return true;
}

/* The request's body: {"env": {...}, "stdin": "..."}. Returns the name of what is not UTF-8, NULL: fine. */
static const char *make_body(struct text *body, const struct text *input)
{
	const char *separator = "";

	text_puts(body, "{\"env\":{");
	for (size_t i = 0; i < sizeof(variables) / sizeof(*variables); i++) {
		const char *value = getenv(variables[i]);

		if (!value)
			continue;
		text_puts(body, separator);
		json_string(body, variables[i], strlen(variables[i]));
		text_puts(body, ":");
		if (!json_string(body, value, strlen(value)))
			return variables[i];
		separator = ",";
	}
	text_puts(body, "},\"stdin\":");
	if (!json_string(body, input->at, input->length))
		return "standard input";
	text_puts(body, "}");
	return NULL;
}

/* One request. `why` gets the reason unless it was answered; `answer` the octets of the response. */
static enum attempt attempt(const char *path, const struct text *request, long long deadline, struct text *answer,
			    char *why, size_t room)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	enum attempt result = REFUSED;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	char chunk[16384];

	memcpy(address.sun_path, path, strlen(path) + 1);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ||
	    !write_all(fd, request->at, request->length)) {
		snprintf(why, room, "%s: %s", path, strerror(errno));
		goto out;
	}
	result = BROKEN;
	for (;;) {
		struct pollfd waiting = { .fd = fd, .events = POLLIN };
		long long left = deadline - now_ms();
		ssize_t n;

		if (left <= 0 || poll(&waiting, 1, (int)left) == 0) {
			snprintf(why, room, "%s: no answer in time", path);
			break;
		}
		n = read(fd, chunk, sizeof(chunk));
		if (n < 0 && errno == EINTR)
			continue;
		if (n == 0 && answer->length) {
			result = ANSWERED;
			break;
		}
		if (n <= 0 || answer->length + (size_t)n > ANSWER_MAX) {
			snprintf(why, room, "%s: %s", path,
				 n < 0 ? strerror(errno) : "the connection ended without an answer");
			break;
		}
		text_add(answer, chunk, (size_t)n);
	}
out:
	if (fd >= 0)
		close(fd);
	return result;
}

/* The body of a whole HTTP/1.1 response with a Content-Length; NULL: it is not one. */
static const char *response_body(const struct text *answer, int *status, size_t *length)
{
	const char *end = memmem(answer->at, answer->length, "\r\n\r\n", 4), *field;
	size_t announced;

	if (!end || sscanf(answer->at, "HTTP/1.%*d %d", status) != 1)
		return NULL;
	field = strcasestr(answer->at, "\r\ncontent-length:");
	if (!field || field > end || sscanf(field + strlen("\r\ncontent-length:"), "%zu", &announced) != 1)
		return NULL;
	*length = answer->length - (size_t)(end + 4 - answer->at);
	return *length == announced ? end + 4 : NULL;
}

/* Asks until there is an answer or the time is over. 0: `answer` holds a response with status 200. */
static int ask(const char *path, const struct text *request, long timeout, struct text *answer)
{
	long long deadline = now_ms() + timeout * 1000, pause = FIRST_PAUSE;
	char why[256] = "", details[512];

	for (;;) {
		int status = 0;
		size_t length;

		text_free(answer);
		if (attempt(path, request, deadline, answer, why, sizeof(why)) == ANSWERED) {
			const char *body = response_body(answer, &status, &length);

			if (body && status == 200)
				return 0;
			if (body && status != 503) {
				snprintf(details, sizeof(details), "%s: status %d: %.300s", path, status, body);
				return fail(CNI_IO, "the Ciliate agent refused the request", details);
			}
			snprintf(why, sizeof(why), "%s: %s", path,
				 body ? "the agent is starting" : "the answer is cut short");
		}
		if (now_ms() + pause >= deadline)
			break;
		usleep((useconds_t)(pause * 1000));
		pause = pause * 2 < LAST_PAUSE ? pause * 2 : LAST_PAUSE;
	}
	snprintf(details, sizeof(details), "%s (waited %ld s); `ciliate status` on this node tells more", why, timeout);
	return fail(CNI_LATER, "the Ciliate agent of this node does not answer", details);
}

int main(void)
{
	struct text input = { 0 }, socket_path = { 0 }, body = { 0 }, request = { 0 }, answer = { 0 }, out = { 0 };
	const char *command = getenv("CNI_COMMAND"), *path, *bad, *document;
	long timeout = DEFAULT_TIMEOUT, code = 1;
	struct sockaddr_un address;
	char head[128];
	int status;
	size_t length;

	if (!command)
		return usage();
	if (!read_all(STDIN_FILENO, &input, INPUT_MAX))
		return fail(CNI_IO, "standard input cannot be read", "an error, or more than 1 MiB");
	if (!strcmp(command, "VERSION")) {
		puts("{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1."
		     "0\"]}");
		return 0;
	}
	path = json_string_field(input.at, input.length, "agentSocket", &socket_path) ? socket_path.at :
											getenv("CILIATE_SOCKET");
	if (!path || !*path)
		path = DEFAULT_SOCKET;
	if (strlen(path) >= sizeof(address.sun_path))
		return fail(CNI_ENVIRONMENT, "the agent's socket has too long a path", path);
	if (json_number_field(input.at, input.length, "agentTimeout", &timeout) && (timeout < 1 || timeout > 600))
		return fail(CNI_DECODE, "agentTimeout is not in 1..600", "");
	bad = make_body(&body, &input);
	if (bad)
		return fail(CNI_DECODE, "not valid UTF-8", bad);
	snprintf(head, sizeof(head), "%zu", body.length);
	text_puts(&request, "POST /v1/cni HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n"
			    "Content-Type: application/json\r\nContent-Length: ");
	text_puts(&request, head);
	text_puts(&request, "\r\n\r\n");
	text_add(&request, body.at, body.length);
	if (ask(path, &request, timeout, &answer))
		return 1;
	document = response_body(&answer, &status, &length);
	if (!document || !json_string_field(document, length, "stdout", &out) ||
	    !json_number_field(document, length, "exit_code", &code))
		return fail(CNI_DECODE, "the Ciliate agent's answer is not understood", path);
	fwrite(out.at, 1, out.length, stdout);
	return code ? 1 : 0;
}
