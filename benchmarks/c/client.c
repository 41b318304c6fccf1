// Load on a proxy, and what its clients see of it. Arguments are NAME=VALUE:
//
//   port=8000 key=sk-… model=stand-in pids=12,34   whom to ask, and whose processor time to read
//   conns=64 seconds=3      so many keep-alive connections; each asks again until the time is over. seconds=0: once
//   stream=1 tokens=64 pace_us=10000               what is asked for; see upstream.c
//   rate=1000               requests a second over all connections; 0: as soon as the last answer has come
//   spread_us=640000        the connections begin evenly spread over this time; 0: all at once
//   pad=5000000             bytes of prompt
//   settle_ms=1000          the processor time is read so much later, for work that is put off
//
// Prints one line of JSON; times are microseconds. A failure is anything but 200, the tokens asked for, the
// terminator and a body that ends as HTTP says; the first one is told on stderr.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 512, READ_SIZE = 256 * 1024, CARRY = 16, HEAD_MOST = 16 * 1024 };
enum phase { CLOSED, CONNECTING, IDLE, SENDING, HEAD, BODY };
enum framing { LENGTH, CHUNKED, TO_THE_END };
enum piece { SIZE_LINE, DATA, DATA_END, TRAILER };

typedef struct {
    int fd;
    enum phase phase;
    enum framing framing;
    enum piece piece;
    int status, closing, done_seen, watching_out;
    size_t sent, left; // of the request; of the body or chunk
    char *head;
    size_t head_len;
    char line[32];
    size_t line_len, trailer_len;
    char carry[CARRY]; // the end of the payload so far: what is looked for may be cut in two
    size_t carry_len;
    long tokens;
    long long asked_at, last_token_at, connect_at, due;
} conn;

typedef struct {
    long long *at;
    size_t count, room;
} series;

static int port = 8000, conns = 1, stream = 1, rate, epoll_fd, timer_fd;
static long tokens = 64, pace_us = 10000, pad, spread_us, settle_ms;
static double seconds = 1;
static const char *key = "none", *model = "stand-in", *pids = "";
static char *request;
static size_t request_size;
static conn *all;
static series firsts, gaps, answers, connects;
static long requests, failures, token_count, live;
static long long begun_at, ends_at, next_due, rate_step;

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void note(series *s, long long ns) {
    if (s->count == s->room) s->at = realloc(s->at, (s->room = s->room * 2 + 4096) * sizeof *s->at);
    s->at[s->count++] = ns;
}

static int ascending(const void *a, const void *b) {
    long long x = *(const long long *)a, y = *(const long long *)b;
    return x < y ? -1 : x > y;
}

static void print_series(const char *name, series *s) {
    qsort(s->at, s->count, sizeof *s->at, ascending);
    double at[] = {0.5, 0.99, 1}, shown[3] = {0, 0, 0};
    for (int i = 0; i < 3 && s->count; i++) shown[i] = (double)s->at[(size_t)((double)(s->count - 1) * at[i] + 0.5)] / 1e3;
    printf(", \"%s\": {\"count\": %zu, \"p50\": %.1f, \"p99\": %.1f, \"max\": %.1f}", name, s->count, shown[0], shown[1],
           shown[2]);
}

// Processor time of the processes in nanoseconds, ended threads included.
static long long cpu_ns(void) {
    long long sum = 0;
    for (const char *at = pids; *at; at = *at ? at + 1 : at) {
        clockid_t clock;
        struct timespec t;
        if (clock_getcpuclockid((pid_t)strtol(at, (char **)&at, 10), &clock) == 0 && clock_gettime(clock, &t) == 0)
            sum += t.tv_sec * 1000000000LL + t.tv_nsec;
    }
    return sum;
}

static void watch(conn *c, int out) {
    if (c->watching_out == out) return;
    struct epoll_event e = {EPOLLIN | (out ? EPOLLOUT : 0), {.ptr = c}};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
    c->watching_out = out;
}

static void dial(conn *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) {
        perror("client: socket");
        exit(1);
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->phase = CONNECTING;
    c->connect_at = now_ns();
    c->watching_out = 1;
    struct epoll_event e = {EPOLLIN | EPOLLOUT, {.ptr = c}};
    if (connect(c->fd, (void *)&to, sizeof to) && errno != EINPROGRESS) {
        perror("client: connect");
        exit(1);
    }
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &e);
}

static void hang_up(conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->phase = CLOSED;
}

// When the connection asks next, or never again.
static void plan(conn *c, long long now) {
    if (rate) {
        c->due = next_due > now ? next_due : now;
        next_due += rate_step;
    } else {
        c->due = now;
    }
    if (seconds == 0 || c->due >= ends_at) {
        hang_up(c);
        c->due = 0;
        live--;
    }
}

static void fail(conn *c, const char *why) {
    if (failures++ == 0)
        fprintf(stderr, "client: first failure: %s (status %d, %ld tokens, errno %d): %.300s\n", why, c->status, c->tokens,
                errno, c->head_len ? c->head : "");
    hang_up(c);
    plan(c, now_ns() + 10000000);
}

static void push(conn *c) {
    while (c->sent < request_size) {
        ssize_t n = send(c->fd, request + c->sent, request_size - c->sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) return watch(c, 1);
            return fail(c, "cannot send");
        }
        c->sent += (size_t)n;
    }
    watch(c, 0);
    if (c->phase == SENDING) c->phase = HEAD;
}

static void ask(conn *c) {
    c->status = c->closing = c->done_seen = 0;
    c->sent = c->left = c->head_len = c->line_len = c->trailer_len = c->carry_len = 0;
    c->piece = SIZE_LINE;
    c->tokens = 0;
    c->due = 0;
    c->last_token_at = 0;
    c->phase = SENDING;
    c->asked_at = now_ns();
    push(c);
}

static void complete(conn *c, long long now) {
    if (c->status != 200) return fail(c, "status");
    if (stream && (c->tokens != tokens || !c->done_seen)) return fail(c, "tokens or terminator missing");
    requests++;
    note(&answers, now - c->asked_at);
    if (c->closing) hang_up(c);
    else c->phase = IDLE;
    plan(c, now);
}

static long count(const char *text, size_t size, const char *what, size_t what_size) {
    long found = 0;
    for (const char *at = text, *end = text + size; (at = memmem(at, (size_t)(end - at), what, what_size)); at += what_size)
        found++;
    return found;
}

// Looks for tokens in what came, together with the end of what came before.
static void payload(conn *c, char *text, size_t size, long long now) {
    static char joined[READ_SIZE + CARRY];
    if (!stream || !size) return;
    memcpy(joined, c->carry, c->carry_len);
    memcpy(joined + c->carry_len, text, size);
    size_t whole = c->carry_len + size;
    // Of what stands in the carry, less than the mark is looked at again, so that nothing counts twice.
    size_t again = c->carry_len > 5 ? c->carry_len - 5 : 0;
    long found = count(joined + again, whole - again, "\" tok\"", 6);
    if (found) {
        if (!c->tokens) note(&firsts, now - c->asked_at);
        else note(&gaps, now - c->last_token_at - pace_us * 1000);
        for (long i = 1; i < found && c->tokens; i++) note(&gaps, -pace_us * 1000);
        c->tokens += found;
        token_count += found;
        c->last_token_at = now;
    }
    size_t from = whole > CARRY ? whole - CARRY : 0;
    if (memmem(joined, whole, "data: [DONE]", 12)) c->done_seen = 1;
    c->carry_len = whole - from;
    memcpy(c->carry, joined + from, c->carry_len);
}

// Follows the chunks; how much of the text was used, and whether the body has ended.
static size_t chunks(conn *c, char *text, size_t size, int *ended, long long now) {
    size_t at = 0;
    while (at < size && !*ended) {
        if (c->piece == DATA) {
            size_t part = size - at < c->left ? size - at : c->left;
            payload(c, text + at, part, now);
            at += part;
            if (!(c->left -= part)) c->piece = DATA_END;
            continue;
        }
        char byte = text[at++];
        if (c->piece == SIZE_LINE) {
            if (byte != '\n') {
                if (c->line_len + 1 < sizeof c->line) c->line[c->line_len++] = byte;
                continue;
            }
            c->line[c->line_len] = 0;
            c->line_len = 0;
            c->left = strtoul(c->line, NULL, 16);
            c->piece = c->left ? DATA : TRAILER;
        } else if (c->piece == DATA_END) {
            if (byte == '\n') c->piece = SIZE_LINE;
        } else if (byte == '\n') {
            *ended = c->trailer_len == 0;
            c->trailer_len = 0;
        } else if (byte != '\r') {
            c->trailer_len++;
        }
    }
    return at;
}

static int read_head(conn *c) {
    c->framing = TO_THE_END;
    c->status = atoi(c->head + 9);
    for (char *line = strstr(c->head, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        char *field = line + 2;
        if (!strncasecmp(field, "content-length:", 15)) {
            c->framing = LENGTH;
            c->left = strtoul(field + 15, NULL, 10);
        } else if (!strncasecmp(field, "transfer-encoding:", 18)) {
            c->framing = CHUNKED;
        } else if (!strncasecmp(field, "connection: close", 17)) {
            c->closing = 1;
        }
    }
    c->phase = BODY;
    return c->framing == LENGTH && c->left == 0;
}

static void take(conn *c) {
    static char text[READ_SIZE];
    ssize_t n = recv(c->fd, text, sizeof text, 0);
    long long now = now_ns();
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        if (n == 0 && c->phase == BODY && c->framing == TO_THE_END) {
            c->closing = 1;
            return complete(c, now);
        }
        if (c->phase == IDLE) return hang_up(c); // an idle connection may end; the next request dials anew
        return fail(c, "connection ended");
    }
    char *at = text;
    size_t size = (size_t)n;
    int ended = 0;
    if (c->phase == SENDING) c->phase = HEAD;
    if (c->phase == HEAD) {
        if (!c->head) c->head = malloc(HEAD_MOST + 1);
        size_t old = c->head_len, part = size < HEAD_MOST - old ? size : HEAD_MOST - old;
        memcpy(c->head + old, at, part);
        c->head[c->head_len = old + part] = 0;
        char *blank = strstr(c->head, "\r\n\r\n");
        if (!blank) return part < size ? fail(c, "a long head") : (void)0;
        size_t used = (size_t)(blank - c->head) + 4 - old;
        ended = read_head(c);
        at += used;
        size -= used;
    }
    if (c->phase == BODY && c->framing == LENGTH) {
        size_t part = size < c->left ? size : c->left;
        payload(c, at, part, now);
        ended = !(c->left -= part);
    } else if (c->phase == BODY && c->framing == CHUNKED) {
        chunks(c, at, size, &ended, now);
    } else if (c->phase == BODY) {
        payload(c, at, size, now);
    }
    if (ended) complete(c, now);
}

static void make_request(void) {
    char order[160];
    snprintf(order, sizeof order, "[pace_us=%ld tokens=%ld bytes=0]", pace_us, tokens);
    size_t room = (size_t)pad + 2048;
    char *body = malloc(room);
    int size = snprintf(body, room,
                        "{\"model\":\"%s\",\"stream\":%s,\"max_tokens\":%ld,\"temperature\":0.7,\"messages\":["
                        "{\"role\":\"system\",\"content\":\"You are a helpful assistant.\"},"
                        "{\"role\":\"user\",\"content\":\"%s Tell me about llamas. ",
                        model, stream ? "true" : "false", tokens, order);
    static const char words[] = "The llama is a domesticated South American camelid. ";
    for (long i = 0; i < pad; i++) body[size++] = words[i % (long)(sizeof words - 1)];
    size += snprintf(body + size, room - (size_t)size, "\"}]}");
    request = malloc((size_t)size + 1024);
    int head = snprintf(request, 1024,
                        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAuthorization: Bearer %s\r\n"
                        "Origin: https://app.example\r\nUser-Agent: corral-bench\r\nAccept: %s\r\n"
                        "Content-Type: application/json\r\nContent-Length: %d\r\n\r\n",
                        port, key, stream ? "text/event-stream" : "application/json", size);
    memcpy(request + head, body, (size_t)size);
    request_size = (size_t)(head + size);
    free(body);
}

static void set_timer(long long at) {
    struct itimerspec when = {{0, 0}, {at / 1000000000, at % 1000000000}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

// Begins what is due, and sets the timer for what is due next.
static void begin_due(void) {
    long long now = now_ns(), next = 0;
    for (int i = 0; i < conns; i++) {
        conn *c = &all[i];
        if (c->due && c->due <= now) {
            if (c->phase == CLOSED) c->due = 0, dial(c);
            else if (c->phase == IDLE) ask(c);
        } else if (c->due && (!next || c->due < next)) {
            next = c->due;
        }
    }
    if (next) set_timer(next);
}

static void on_event(conn *c, unsigned events) {
    if (c->phase == CLOSED) return;
    if (c->phase == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        errno = error;
        if (error) return fail(c, "connect");
        note(&connects, now_ns() - c->connect_at);
        return ask(c);
    }
    if (events & EPOLLOUT) push(c);
    if (c->phase != CLOSED && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) take(c);
}

static void read_arguments(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        char *is = strchr(argv[i], '=');
        if (!is) continue;
        const char *name = argv[i], *value = is + 1;
        *is = 0;
        if (!strcmp(name, "port")) port = atoi(value);
        else if (!strcmp(name, "conns")) conns = atoi(value);
        else if (!strcmp(name, "seconds")) seconds = atof(value);
        else if (!strcmp(name, "stream")) stream = atoi(value);
        else if (!strcmp(name, "tokens")) tokens = atol(value);
        else if (!strcmp(name, "pace_us")) pace_us = atol(value);
        else if (!strcmp(name, "rate")) rate = atoi(value);
        else if (!strcmp(name, "spread_us")) spread_us = atol(value);
        else if (!strcmp(name, "pad")) pad = atol(value);
        else if (!strcmp(name, "settle_ms")) settle_ms = atol(value);
        else if (!strcmp(name, "key")) key = value;
        else if (!strcmp(name, "model")) model = value;
        else if (!strcmp(name, "pids")) pids = value;
        else fprintf(stderr, "client: unknown argument %s\n", name), exit(2);
    }
}

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    make_request();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event e = {EPOLLIN, {.ptr = &timer_fd}};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);

    all = calloc((size_t)conns, sizeof *all);
    live = conns;
    long long cpu_before = cpu_ns();
    begun_at = now_ns();
    ends_at = begun_at + (long long)(seconds * 1e9);
    if (rate) {
        rate_step = 1000000000LL / rate;
        next_due = begun_at + rate_step * conns;
    }
    for (int i = 0; i < conns; i++) {
        all[i].fd = -1;
        all[i].due = begun_at + (rate ? rate_step * i : spread_us * 1000LL * i / conns);
    }
    // A proxy that gives no answers at all must not hold up the benchmark for ever.
    long long patience = ends_at + 60000000000LL;
    static struct epoll_event events[EVENTS];
    begin_due();
    while (live > 0 && now_ns() < patience) {
        int n = epoll_wait(epoll_fd, events, EVENTS, 1000);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == &timer_fd) {
                unsigned long long times;
                if (read(timer_fd, &times, sizeof times) < 0) continue;
            } else {
                on_event(events[i].data.ptr, events[i].events);
            }
        }
        begin_due();
    }
    long long took = now_ns() - begun_at;
    failures += live;
    usleep((useconds_t)settle_ms * 1000);
    long long cpu = cpu_ns() - cpu_before;
    printf("{\"requests\": %ld, \"failures\": %ld, \"tokens\": %ld, \"seconds\": %.6f, \"cpu_us\": %.1f", requests, failures,
           token_count, (double)took / 1e9, (double)cpu / 1e3);
    print_series("first", &firsts);
    print_series("gap", &gaps);
    print_series("answer", &answers);
    print_series("connect", &connects);
    printf("}\n");
    return 0;
}
