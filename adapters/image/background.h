// Work that must not hold up a step: on a thread of its own at a lower priority, while the caller waits.
//
// Not on the caller's thread: a thread of Python's that is short of processor time makes whoever gives up the GIL to it wait
// until it runs. This one never asks for the GIL.
#pragma once

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>
#include <thread>

// On the caller's thread after all where there can be no more threads (a container's limit, no room for a stack).
template <class Work> auto in_background(int nice, Work work) {
    if (nice <= 0) return work();
    decltype(work()) result{};
    std::thread thread;
    try {
        thread = std::thread([&] {
            id_t self = (id_t)syscall(SYS_gettid);  // on Linux a thread has a priority of its own
            setpriority(PRIO_PROCESS, self, std::min(19, getpriority(PRIO_PROCESS, self) + nice));
            result = work();
        });
    } catch (const std::system_error&) {  // it may not leave this library: Python could not catch it
        return work();
    }
    thread.join();
    return result;
}
