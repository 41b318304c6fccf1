// A stand-in for llama-server that costs almost nothing, so that what is measured is the proxy in front of it.
//
//   upstream PORT            listens on 127.0.0.1
//   upstream ... --port N    the same: it can be started in llama-server's place; other arguments are ignored
//
// What it does is asked for in the prompt, so that it passes through any proxy:
//   [pace_us=10000 tokens=64 bytes=0]
// A request with "stream": true gets that many tokens, one each pace_us, the first at once, written as llama-server
// writes them: one chunk and one write for each event. bytes > 0: one answer of that size instead, as fast as it goes.
// Any other POST gets a small JSON answer at once.
//
// Tokens leave on a grid of 1 ms, like those of one decode step: the noise of a timer for each would be measured too.
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

enum { WHEEL = 4096, EVENTS = 512, READ_SIZE = 64 * 1024, OUT_ENOUGH = 256 * 1024 };

typedef struct conn {
    int fd;
    char *in;
    size_t in_len, in_cap;
    size_t scan; // how far a chunked request body has been walked
    char *out;
    size_t out_at, out_len, out_cap;
    long tokens_left, bytes_left, tokens, pace_ms;
    int busy, watching_out, closing;
    struct conn *prev, *next; // in a slot of the wheel
    int on_wheel;
} conn;

static conn *wheel[WHEEL];
static long long ticked_to; // ms
static int epoll_fd, timer_fd, on_wheel, ticking;
static conn *gone; // freed after the events at hand, which may still point to them

static const char HEAD[] =
    "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\nX-Accel-Buffering: no\r\n"
    "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n";
#define COMMON "\"created\":1763700000,\"id\":\"chatcmpl-0123456789abcdefghijABCDEFGHIJ01\",\"model\":\"stand-in\"," \
               "\"system_fingerprint\":\"b1-standin\",\"object\":\"chat.completion.chunk\""
#define ROLE "data: {\"choices\":[{\"finish_reason\":null,\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":null}}]," COMMON
#define TOKEN "data: {\"choices\":[{\"finish_reason\":null,\"index\":0,\"delta\":{\"content\":\" tok\"}}]," COMMON "}\n\n"
static const char PROGRESS_0[] = ROLE ",\"prompt_progress\":{\"total\":22,\"cache\":0,\"processed\":0,\"time_ms\":0}}\n\n";
static const char PROGRESS_1[] = ROLE ",\"prompt_progress\":{\"total\":22,\"cache\":0,\"processed\":22,\"time_ms\":1}}\n\n";
static const char FIRST[] = ROLE "}\n\n" TOKEN;
static const char NEXT[] = TOKEN;
static const char DONE[] = "data: [DONE]\n\n";
static const char WHOLE[] =
    "{\"choices\":[{\"finish_reason\":\"length\",\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\" tok tok tok "
    "tok\"}}],\"created\":1763700000,\"model\":\"stand-in\",\"system_fingerprint\":\"b1-standin\",\"object\":"
    "\"chat.completion\",\"usage\":{\"completion_tokens\":4,\"prompt_tokens\":22,\"total_tokens\":26,"
    "\"prompt_tokens_details\":{\"cached_tokens\":0}},\"id\":\"chatcmpl-0123456789abcdefghijABCDEFGHIJ01\",\"timings\":{"
    "\"cache_n\":0,\"prompt_n\":22,\"prompt_ms\":1.304,\"prompt_per_token_ms\":0.059,\"prompt_per_second\":16871.2,"
    "\"predicted_n\":4,\"predicted_ms\":0.256,\"predicted_per_token_ms\":0.064,\"predicted_per_second\":15625.0}}";
static const char MODELS[] =
    "{\"models\":[{\"name\":\"stand-in\",\"model\":\"stand-in\",\"capabilities\":[\"completion\"]}],\"object\":\"list\","
    "\"data\":[{\"id\":\"stand-in\",\"object\":\"model\",\"created\":1763700000,\"owned_by\":\"llamacpp\","
    "\"meta\":{\"n_vocab\":576,\"n_ctx\":8388608,\"n_ctx_train\":8388608,\"n_params\":155968,\"size\":623872}}]}";
static const char PROPS[] = "{\"default_generation_settings\":{\"n_ctx\":8388608},\"total_slots\":2048,"
                            "\"model_path\":\"stand-in\",\"build_info\":\"b1-standin\"}";

static long long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void put(conn *c, const char *text, size_t size) {
    if (c->out_len + size > c->out_cap) {
        c->out_cap = (c->out_len + size) * 2 + 1024;
        c->out = realloc(c->out, c->out_cap);
    }
    memcpy(c->out + c->out_len, text, size);
    c->out_len += size;
}

static void put_chunk(conn *c, const char *text, size_t size) {
    char line[24];
    put(c, line, (size_t)snprintf(line, sizeof line, "%zx\r\n", size));
    put(c, text, size);
    put(c, "\r\n", 2);
}

static void set_ticking(int on) {
    struct itimerspec each = {{0, on ? 1000000 : 0}, {0, on ? 1 : 0}};
    if (on) { // from the next whole millisecond on
        long long next = now_ms() + 1;
        each.it_value.tv_sec = next / 1000;
        each.it_value.tv_nsec = next % 1000 * 1000000;
        ticked_to = next - 1;
    }
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &each, NULL);
    ticking = on;
}

static void leave_wheel(conn *c, long slot) {
    if (!c->on_wheel) return;
    if (c->prev) c->prev->next = c->next;
    else wheel[slot] = c->next;
    if (c->next) c->next->prev = c->prev;
    c->on_wheel = 0;
    on_wheel--;
}

static long slot_of[65536]; // by fd

static void enter_wheel(conn *c, long long at_ms) {
    long slot = (long)(at_ms % WHEEL);
    on_wheel++;
    if (!ticking) set_ticking(1);
    slot_of[c->fd] = slot;
    c->prev = NULL;
    c->next = wheel[slot];
    if (c->next) c->next->prev = c;
    wheel[slot] = c;
    c->on_wheel = 1;
}

static void watch(conn *c, int out) {
    if (c->watching_out == out) return;
    struct epoll_event e = {EPOLLIN | (out ? EPOLLOUT : 0), {.ptr = c}};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
    c->watching_out = out;
}

static void drop(conn *c) {
    leave_wheel(c, slot_of[c->fd]);
    close(c->fd);
    c->fd = -1;
    c->next = gone;
    gone = c;
}

// 0 if all is sent, 1 if something waits for the client, -1 if it has gone.
static int push(conn *c) {
    while (c->out_at < c->out_len) {
        ssize_t n = send(c->fd, c->out + c->out_at, c->out_len - c->out_at, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) return drop(c), -1;
            watch(c, 1);
            return 1;
        }
        c->out_at += (size_t)n;
    }
    c->out_at = c->out_len = 0;
    watch(c, 0);
    return 0;
}

static int serve(conn *c);

static int finish(conn *c) {
    char last[512];
    int size = snprintf(last, sizeof last,
                        "data: {\"choices\":[{\"finish_reason\":\"length\",\"index\":0,\"delta\":{}}]," COMMON
                        ",\"timings\":{\"cache_n\":0,\"prompt_n\":22,\"prompt_ms\":1.336,\"predicted_n\":%ld,"
                        "\"predicted_ms\":0.619}}\n\n",
                        c->tokens);
    put_chunk(c, last, (size_t)size);
    if (push(c) < 0) return -1;
    put_chunk(c, DONE, sizeof DONE - 1);
    if (push(c) < 0) return -1;
    put(c, "0\r\n\r\n", 5);
    c->busy = 0;
    int sent = push(c);
    if (sent < 0) return -1;
    if (c->closing && sent == 0) return drop(c), -1;
    return serve(c);
}

static int flood(conn *c) {
    while (c->bytes_left > 0) {
        while (c->bytes_left > 0 && c->out_len < OUT_ENOUGH) {
            put_chunk(c, NEXT, sizeof NEXT - 1);
            c->bytes_left -= (long)sizeof NEXT - 1;
            c->tokens++;
        }
        int sent = push(c);
        if (sent) return sent;
    }
    return finish(c);
}

// The next token of a stream is due.
static void step(conn *c, long long at_ms) {
    put_chunk(c, NEXT, sizeof NEXT - 1);
    if (push(c) < 0) return;
    if (--c->tokens_left > 0) enter_wheel(c, at_ms + c->pace_ms);
    else finish(c);
}

static void tick(void) {
    for (long long now = now_ms(); ticked_to < now && on_wheel;) {
        long slot = (long)(++ticked_to % WHEEL);
        conn *due = wheel[slot], *next;
        for (; due; due = next) {
            next = due->next;
            leave_wheel(due, slot);
            step(due, ticked_to);
        }
    }
    if (!on_wheel) set_ticking(0);
}

static long asked(const char *text, size_t size, const char *name, long otherwise) {
    const char *at = memmem(text, size, name, strlen(name));
    return at ? atol(at + strlen(name)) : otherwise;
}

static int answer_stream(conn *c, const char *body, size_t size) {
    const char *order = memmem(body, size, "[pace_us=", 9);
    size_t left = order ? (size_t)(body + size - order) : 0;
    if (left > 128) left = 128;
    c->pace_ms = (order ? asked(order, left, "pace_us=", 0) : 0) / 1000;
    c->tokens = order ? asked(order, left, "tokens=", 64) : 64;
    c->bytes_left = order ? asked(order, left, "bytes=", 0) : 0;
    c->busy = 1;
    put(c, HEAD, sizeof HEAD - 1);
    if (memmem(body, size, "\"return_progress\":true", 22)) {
        put_chunk(c, PROGRESS_0, sizeof PROGRESS_0 - 1);
        if (push(c) < 0) return -1;
        put_chunk(c, PROGRESS_1, sizeof PROGRESS_1 - 1);
        if (push(c) < 0) return -1;
    }
    put_chunk(c, FIRST, sizeof FIRST - 1);
    if (push(c) < 0) return -1;
    c->tokens_left = c->tokens - 1;
    if (c->bytes_left > 0) {
        c->tokens = 1;
        return flood(c);
    }
    if (c->pace_ms > 0 && c->pace_ms < WHEEL && c->tokens_left > 0) {
        enter_wheel(c, now_ms() + c->pace_ms);
        return 0;
    }
    for (; c->tokens_left > 0; c->tokens_left--) {
        put_chunk(c, NEXT, sizeof NEXT - 1);
        if (push(c) < 0) return -1;
    }
    return finish(c);
}

static int answer_whole(conn *c, const char *text, size_t size) {
    char head[256];
    int head_size = snprintf(head, sizeof head,
                             "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n"
                             "Content-Type: application/json; charset=utf-8\r\nContent-Length: %zu\r\n"
                             "Keep-Alive: timeout=5, max=100\r\n\r\n",
                             size);
    put(c, head, (size_t)head_size);
    put(c, text, size);
    int sent = push(c);
    if (sent < 0) return -1;
    if (c->closing && sent == 0) return drop(c), -1;
    return 0;
}

static int answer(conn *c, const char *body, size_t size) {
    if (!strncmp(c->in, "POST", 4)) {
        int stream = memmem(body, size, "\"stream\":true", 13) || memmem(body, size, "\"stream\": true", 14);
        return stream ? answer_stream(c, body, size) : answer_whole(c, WHOLE, sizeof WHOLE - 1);
    }
    if (!strncmp(c->in, "GET /props", 10)) return answer_whole(c, PROPS, sizeof PROPS - 1);
    if (strstr(c->in, "/models ") && strstr(c->in, "/models ") < c->in + 40) return answer_whole(c, MODELS, sizeof MODELS - 1);
    return answer_whole(c, "{\"status\":\"ok\"}", 15);
}

// The size of a chunked body that begins at `from`, or 0 if it is not all there.
static size_t chunked_end(conn *c, size_t from) {
    if (c->scan < from) c->scan = from;
    for (;;) {
        char *line = memmem(c->in + c->scan, c->in_len - c->scan, "\r\n", 2);
        if (!line) return 0;
        size_t size = strtoul(c->in + c->scan, NULL, 16), end = (size_t)(line - c->in) + 2 + size + 2;
        if (end > c->in_len) return 0;
        if (size == 0) return end - from;
        c->scan = end;
    }
}

// Answers the requests that are whole; -1 if the client has gone.
static int serve(conn *c) {
    while (!c->busy && c->in_len) {
        char *blank = memmem(c->in, c->in_len, "\r\n\r\n", 4);
        if (!blank) return 0;
        size_t head = (size_t)(blank - c->in) + 4, size = 0;
        int chunked = 0;
        for (char *line = c->in; line < blank; line = (char *)memmem(line, c->in_len, "\r\n", 2) + 2) {
            if (!strncasecmp(line, "content-length:", 15)) size = strtoul(line + 15, NULL, 10);
            if (!strncasecmp(line, "transfer-encoding: chunked", 26)) chunked = 1;
            if (!strncasecmp(line, "connection: close", 17)) c->closing = 1;
            if (!strncasecmp(line, "expect: 100", 11) && head == c->in_len) {
                put(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
                if (push(c) < 0) return -1;
            }
        }
        if (chunked && !(size = chunked_end(c, head))) return 0;
        if (c->in_len < head + size) return 0;
        *blank = 0; // what looks for text in the head stops there
        if (answer(c, c->in + head, size) < 0) return -1;
        memmove(c->in, c->in + head + size, c->in_len - head - size);
        c->in_len -= head + size;
        c->scan = 0;
        if (c->in_cap > 1024 * 1024 && c->in_len < 1024) c->in = realloc(c->in, c->in_cap = READ_SIZE);
    }
    return 0;
}

static void take(conn *c) {
    for (;;) {
        if (c->in_cap - c->in_len < READ_SIZE) {
            c->in_cap = c->in_cap * 2 + READ_SIZE;
            c->in = realloc(c->in, c->in_cap);
        }
        size_t room = c->in_cap - c->in_len - 1;
        ssize_t n = recv(c->fd, c->in + c->in_len, room, 0);
        if (n < 0 && errno == EAGAIN) break;
        if (n <= 0) return drop(c);
        c->in_len += (size_t)n;
        if ((size_t)n < room) break;
    }
    c->in[c->in_len] = 0;
    serve(c);
}

static void welcome(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if (fd >= (int)(sizeof slot_of / sizeof *slot_of)) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        conn *c = calloc(1, sizeof *c);
        c->fd = fd;
        struct epoll_event e = {EPOLLIN, {.ptr = c}};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(fd, (void *)&where, sizeof where) || listen(fd, 4096)) die("upstream: listen");
    return fd;
}

int main(int argc, char **argv) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    fprintf(stderr, "stand-in started at %lld.%09ld\n", (long long)t.tv_sec, t.tv_nsec);
    int port = argc > 1 ? atoi(argv[1]) : 0;
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], "--port")) port = atoi(argv[i + 1]);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    int listener = listen_on(port);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event e = {EPOLLIN, {.ptr = &listener}};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
    e.data.ptr = &timer_fd;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);

    static struct epoll_event events[EVENTS];
    for (;;) {
        int n = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            conn *c = events[i].data.ptr;
            if ((void *)c == &listener) {
                welcome(listener);
            } else if ((void *)c == &timer_fd) {
                unsigned long long times;
                if (read(timer_fd, &times, sizeof times) > 0) tick();
            } else if (c->fd >= 0) {
                if (events[i].events & EPOLLOUT && push(c) == 0) {
                    if (c->bytes_left > 0) flood(c);
                    else if (!c->busy && c->closing) drop(c);
                }
                if (c->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) take(c);
            }
        }
        while (gone) {
            conn *c = gone;
            gone = c->next;
            free(c->in);
            free(c->out);
            free(c);
        }
    }
}
