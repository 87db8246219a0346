/* SPDX-License-Identifier: Apache-2.0 */
/* ciliate-cni: the CNI plugin's executable. It relays its input to the agent of the node, which has the logic: a node's
 * host may have no Python. While the agent restarts, the call waits, up to a limit.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include "json.h"

#define DEFAULT_SOCKET "/run/ciliate/ciliate.sock"
#define DEFAULT_TIMEOUT 60 /* seconds */
#define STATUS_TIMEOUT 10  /* seconds, at most: a runtime asks again and again, and may wait for each answer */
#define INPUT_MAX (1 << 20)
#define ANSWER_MAX (4 << 20)
#define FIRST_PAUSE 20 /* milliseconds */
#define LAST_PAUSE 500
#define VERSIONS "\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\""

enum cni_error {
	CNI_ENVIRONMENT = 4,
	CNI_IO = 5,
	CNI_DECODE = 6,
	CNI_CONFIG = 7,
	CNI_LATER = 11,
	CNI_NOT_AVAILABLE = 50,
};

/* What became of one attempt. All calls are idempotent, so that one that failed half-way may be made again. */
enum attempt { ANSWERED, FAILED, TOO_LONG };

static const char *const variables[] = { "CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS",         "CNI_IFNAME",
					 "CNI_ARGS",    "CNI_PATH",        "CNI_NETNS_OVERRIDE" };

/* The specification's version that answers are in: the configuration's, once it is known. */
static char version[16] = "1.1.0";

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
	char number[16];

	text_puts(&out, "{\"cniVersion\":\"");
	text_puts(&out, version);
	snprintf(number, sizeof(number), "%d", code);
	text_puts(&out, "\",\"code\":");
	text_puts(&out, number);
	text_puts(&out, ",\"msg\":");
	json_string(&out, message, strlen(message));
	text_puts(&out, ",\"details\":");
	if (!json_string(&out, details, strlen(details)))
		text_puts(&out, "\""); /* as much of it as is UTF-8 */
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
	fail(CNI_ENVIRONMENT, "CNI_COMMAND is not set", "");
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

/* Waits at most until then for each step; false: it is over already. */
static bool limit(int fd, long long deadline)
{
	long long left = deadline - now_ms();
	struct timeval time = { left / 1000, left % 1000 * 1000 };

	if (left <= 0) {
		errno = EAGAIN;
		return false;
	}
	return !setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof(time)) &&
	       !setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof(time));
}

/* Both ends of the wait, for a busy or a stopped agent, have a limit: its queue of connections may be full, too. */
static bool send_request(int fd, const char *path, const struct text *request, long long deadline)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	size_t sent = 0;

	memcpy(address.sun_path, path, strlen(path) + 1);
	if (!limit(fd, deadline) || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		return false;
	while (sent < request->length) {
		ssize_t n;

		if (!limit(fd, deadline))
			return false;
		n = send(fd, request->at + sent, request->length - sent, MSG_NOSIGNAL);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		sent += (size_t)n;
	}
	return true;
}

static enum attempt receive(int fd, long long deadline, struct text *answer)
{
	char chunk[16384];
	ssize_t n;

	for (;;) {
		if (!limit(fd, deadline))
			return FAILED;
		n = recv(fd, chunk, sizeof(chunk), 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n == 0 && !answer->length)
			errno = ECONNRESET;
		if (n <= 0)
			return n == 0 && answer->length ? ANSWERED : FAILED;
		if (answer->length + (size_t)n > ANSWER_MAX)
			return TOO_LONG;
		text_add(answer, chunk, (size_t)n);
	}
}

/* One request; `answer` gets the octets of the response, `why` the reason when it FAILED. */
static enum attempt attempt(const char *path, const struct text *request, long long deadline, struct text *answer,
			    char *why, size_t room)
{
	enum attempt result = FAILED;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd >= 0 && send_request(fd, path, request, deadline))
		result = receive(fd, deadline, answer);
	if (result == FAILED)
		snprintf(why, room, "%s: %s", path, errno == EAGAIN ? "no answer in time" : strerror(errno));
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

/* What the agent says of itself in the body of a refusal. */
static void excuse(const char *body, size_t length, char *why, size_t room)
{
	struct text error = { 0 };

	if (json_string_field(body, length, "error", &error) == JSON_FOUND)
		snprintf(why, room, "%s", error.at);
	else
		snprintf(why, room, "%.*s", (int)(length < 300 ? length : 300), body);
	text_free(&error);
}

/* Asks until there is an answer or the time is over. 0: `answer` holds a response with status 200. */
static int ask(const char *path, const struct text *request, long timeout, int code, struct text *answer)
{
	long long deadline = now_ms() + timeout * 1000, pause = FIRST_PAUSE;
	char why[512] = "", details[768];

	for (;;) {
		int status = 0;
		size_t length;
		enum attempt result;

		text_free(answer);
		result = attempt(path, request, deadline, answer, why, sizeof(why));
		if (result == TOO_LONG)
			return fail(CNI_IO, "the Ciliate agent's answer is too long", path);
		if (result == ANSWERED) {
			const char *body = response_body(answer, &status, &length);

			if (body && status == 200)
				return 0;
			if (body)
				excuse(body, length, why, sizeof(why));
			if (body && status != 503) {
				snprintf(details, sizeof(details), "%s: status %d: %s", path, status, why);
				return fail(CNI_IO, "the Ciliate agent refused the request", details);
			}
			if (answer->length >= 7 && memcmp(answer->at, "HTTP/1.", 7))
				return fail(CNI_DECODE, "what listens on the socket is no Ciliate agent", path);
			if (!body)
				snprintf(why, sizeof(why), "%s: the answer is cut short", path);
		}
		if (now_ms() + pause >= deadline)
			break;
		usleep((useconds_t)(pause * 1000));
		pause = pause * 2 < LAST_PAUSE ? pause * 2 : LAST_PAUSE;
	}
	snprintf(details, sizeof(details), "%s (waited %ld s); `ciliate status` on this node tells more", why, timeout);
	return fail(code, "the Ciliate agent of this node does not answer", details);
}

/* The answers' version is the configuration's if that is one of ours. */
static void learn_version(const struct text *input)
{
	struct text wanted = { 0 };
	char quoted[sizeof(version) + 2];

	if (json_string_field(input->at, input->length, "cniVersion", &wanted) == JSON_FOUND &&
	    wanted.length < sizeof(version) && strspn(wanted.at, "0123456789.") == wanted.length) {
		snprintf(quoted, sizeof(quoted), "\"%s\"", wanted.at);
		if (strstr(VERSIONS, quoted))
			snprintf(version, sizeof(version), "%s", wanted.at);
	}
	text_free(&wanted);
}

static int print_versions(void)
{
	printf("{\"cniVersion\":\"%s\",\"supportedVersions\":[" VERSIONS "]}\n", version);
	return fflush(stdout) ? 1 : 0;
}

/* Where the agent listens, and how long to wait for it. 0: fine. */
static int read_settings(const struct text *input, struct text *path, long *timeout)
{
	struct text given = { 0 };
	struct sockaddr_un address;
	const char *otherwise = getenv("CILIATE_SOCKET");
	int result = 0;

	switch (json_string_field(input->at, input->length, "agentSocket", &given)) {
	case JSON_INVALID:
		result = fail(CNI_CONFIG, "the network configuration is not JSON, or agentSocket no string", "");
		goto out;
	case JSON_FOUND:
		break;
	case JSON_ABSENT:
		text_puts(&given, otherwise && *otherwise ? otherwise : DEFAULT_SOCKET);
	}
	if (!given.length || strlen(given.at) != given.length || given.length >= sizeof(address.sun_path))
		result = fail(CNI_CONFIG, "agentSocket is not the path of a socket: empty, or over 107 octets",
			      given.at);
	else if (json_number_field(input->at, input->length, "agentTimeout", timeout) == JSON_INVALID || *timeout < 1 ||
		 *timeout > 600)
		result = fail(CNI_CONFIG, "agentTimeout is not a whole number in 1..600", "");
	else
		text_add(path, given.at, given.length);
out:
	text_free(&given);
	return result;
}

static int relay(const struct text *input, const char *path, long timeout, int code)
{
	struct text body = { 0 }, request = { 0 }, answer = { 0 }, out = { 0 };
	const char *bad = make_body(&body, input), *document;
	char number[32];
	long exit_code;
	size_t length;
	int status, result = 1;

	if (bad) {
		fail(CNI_DECODE, "not valid UTF-8", bad);
		goto out;
	}
	snprintf(number, sizeof(number), "%zu", body.length);
	text_puts(&request, "POST /v1/cni HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n"
			    "Content-Type: application/json\r\nContent-Length: ");
	text_puts(&request, number);
	text_puts(&request, "\r\n\r\n");
	text_add(&request, body.at, body.length);
	if (ask(path, &request, timeout, code, &answer))
		goto out;
	document = response_body(&answer, &status, &length);
	if (!document || json_string_field(document, length, "stdout", &out) != JSON_FOUND ||
	    json_number_field(document, length, "exit_code", &exit_code) != JSON_FOUND) {
		fail(CNI_DECODE, "the Ciliate agent's answer is not understood", path);
		goto out;
	}
	fwrite(out.at, 1, out.length, stdout);
	result = fflush(stdout) || exit_code ? 1 : 0;
out:
	text_free(&body);
	text_free(&request);
	text_free(&answer);
	text_free(&out);
	return result;
}

int main(void)
{
	struct text input = { 0 }, path = { 0 };
	const char *command = getenv("CNI_COMMAND");
	long timeout = DEFAULT_TIMEOUT;
	bool whole, status;
	int result;

	if (!command || !*command)
		return usage();
	/* VERSION needs no input: a person who asks has none. */
	whole = (!strcmp(command, "VERSION") && isatty(STDIN_FILENO)) || read_all(STDIN_FILENO, &input, INPUT_MAX);
	text_add(&input, "", 0);
	learn_version(&input);
	if (!strcmp(command, "VERSION")) {
		result = print_versions();
	} else if (!whole) {
		result = fail(CNI_IO, "standard input cannot be read", "an error, or more than 1 MiB");
	} else {
		status = !strcmp(command, "STATUS");
		result = read_settings(&input, &path, &timeout);
		if (status && timeout > STATUS_TIMEOUT)
			timeout = STATUS_TIMEOUT;
		if (!result)
			result = relay(&input, path.at, timeout, status ? CNI_NOT_AVAILABLE : CNI_LATER);
	}
	text_free(&path);
	text_free(&input);
	return result;
}
