/* Counts the bytes that a process copies: by memcpy and memmove, into sockets, and out of them. To be loaded first
   (LD_PRELOAD). Its counters lie in a file of the process's number, in the folder that DDRL_COPIES names. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { USER, SENT, RECEIVED, LEAST = 256 }; /* less is headers, not messages */
static long nowhere[3], *counters = nowhere;

__attribute__((constructor)) static void begin(void)
{
    const char *folder = getenv("DDRL_COPIES");
    char path[4096];
    if (!folder)
        return;
    snprintf(path, sizeof path, "%s/%d", folder, getpid());
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof nowhere))
        return;
    void *page = mmap(NULL, sizeof nowhere, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page != MAP_FAILED)
        counters = page;
}

static void count(int which, long bytes)
{
    __atomic_fetch_add(&counters[which], bytes, __ATOMIC_RELAXED);
}

void *memmove(void *to, const void *from, size_t size)
{
    char *t = to;
    const char *f = from;
    if (size >= LEAST)
        count(USER, (long)size);
    if (t <= f || t >= f + size)
        for (size_t i = 0; i < size; i++)
            t[i] = f[i];
    else
        for (size_t i = size; i-- > 0;)
            t[i] = f[i];
    return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t size) { return memmove(to, from, size); }
void *__memcpy_chk(void *to, const void *from, size_t size, size_t room) { return memmove(to, from, size); }
void *__memmove_chk(void *to, const void *from, size_t size, size_t room) { return memmove(to, from, size); }

ssize_t send(int fd, const void *from, size_t size, int flags)
{
    ssize_t done = syscall(SYS_sendto, fd, from, size, flags, NULL, 0);
    if (done > 0)
        count(SENT, done);
    return done;
}

ssize_t recv(int fd, void *to, size_t size, int flags)
{
    ssize_t done = syscall(SYS_recvfrom, fd, to, size, flags, NULL, NULL);
    if (done > 0)
        count(RECEIVED, done);
    return done;
}
