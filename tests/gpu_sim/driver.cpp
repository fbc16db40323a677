// A simulated CUDA driver: libcuda.so.1 on host memory, on which the real pycuda runs without a GPU.
//
// - Device memory is host memory, so an address can be checked, and read by the simulated TensorRT. It holds garbage
//   when new, is fenced by canaries, and is poisoned when freed.
// - Work is deferred: an asynchronous call only queues, and the thread that synchronises runs the queue. So code that
//   reads a result or reuses a buffer too early sees wrong data every time, not once in a thousand runs.
// - Misuse is refused with the real driver's error code, and kept as a sentence for tests to assert on.
//
// The lock is never held while queued work runs: work may be Python code that wants the GIL, while a thread that has
// the GIL waits for the lock. For the same reason a call that may wait lets go of the GIL itself where its caller
// kept it (pycuda does in mem_free and Event.query, say).
#define __CUDA_API_VERSION_INTERNAL  // declares every version of each function, and renames none
#include <cuda.h>
#include <cudaProfiler.h>
#define GPUSIM_DRIVER
#include "host_kernels.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr unsigned char NEW = 0xCD, FREED = 0xDD, CANARY = 0xFD;
constexpr size_t ALIGNMENT = 256, FENCE = 256;
constexpr size_t LARGE = 4 << 20;        // from here on garbage is mapped, not written: 8 GB must not cost 8 GB
constexpr size_t QUARANTINE = 32 << 20;  // freed bytes kept poisoned, so that a late write is noticed
constexpr size_t QUEUE = 1024;           // operations a stream holds before a launch waits, as the real driver's

using Lock = std::unique_lock<std::mutex>;

struct Stream;
struct Capture;
using StreamPtr = std::shared_ptr<Stream>;
using CapturePtr = std::shared_ptr<Capture>;

struct Context {
    uint64_t id;
    CUdevice device;
    bool primary = false;
    unsigned flags = 0, uses = 1;
    StreamPtr null_stream;
    CUresult broken = CUDA_SUCCESS;  // an error of queued work: every later call returns it
};
using ContextPtr = std::shared_ptr<Context>;

struct Operation {
    uint64_t number = 0;
    std::string name;
    std::function<CUresult()> run;
    std::vector<std::pair<StreamPtr, uint64_t>> after;
};
using OperationPtr = std::shared_ptr<Operation>;

struct Stream {
    uint64_t id;
    ContextPtr context;
    bool blocking = true;  // ordered with the legacy null stream
    std::deque<OperationPtr> queue;
    OperationPtr running;
    uint64_t submitted = 0, completed = 0;  // numbers of the last operation queued, and run
    bool queried = false;
    CapturePtr capture;
    std::set<size_t> tail;  // nodes of the capture that its next operation follows
};

struct Node {
    OperationPtr operation;
    std::set<size_t> after;
};

struct Capture {
    CUstreamCaptureMode mode;
    pthread_t thread;
    StreamPtr origin;
    bool invalid = false;
    std::vector<Node> nodes;
};

struct Record {  // where in which stream an event was recorded
    StreamPtr stream;
    uint64_t number;
    std::chrono::steady_clock::time_point time;
};

struct Event {
    ContextPtr context;
    unsigned flags;
    std::shared_ptr<Record> record;
    bool queried = false;
    CapturePtr capture;
    std::set<size_t> nodes;
};

struct Graph {
    ContextPtr context;
    std::vector<OperationPtr> operations;  // in the order of capture, which keeps every dependency
    std::pair<StreamPtr, uint64_t> launched;  // launches of one executable graph follow each other
};

struct Module {
    ContextPtr context;
    std::string image;
    bool text;  // PTX
};

struct Function {
    ContextPtr context;
    uint64_t module;
    std::string name;
    gpusim::Kernel kernel;
    unsigned block[3] = {1, 1, 1}, shared = 0;
    std::vector<unsigned char> parameters;  // of the cuParamSet family
};

struct Memory {
    size_t bytes;
    ContextPtr context;
    char* mapping = nullptr;
    size_t mapped = 0;
    unsigned flags = 0;
    bool registered = false;
};

struct Entry {  // of the log
    std::string name;
    pthread_t thread;
    uint64_t stream, pointer, bytes;
    int result;
    std::string detail;
};

struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool started = false, logging = false;
    int devices = 1, major = 8, minor = 9, version = CUDA_VERSION;
    size_t total = size_t(8) << 30, used = 0;
    uint64_t next = 0x51000010, number = 0, abandoned = 0;
    std::unordered_map<uint64_t, ContextPtr> contexts;
    std::unordered_map<uint64_t, StreamPtr> streams;
    std::unordered_map<uint64_t, std::shared_ptr<Event>> events;
    std::unordered_map<uint64_t, std::shared_ptr<Graph>> graphs, executables;
    std::unordered_map<uint64_t, std::shared_ptr<Module>> modules;
    std::unordered_map<uint64_t, std::shared_ptr<Function>> functions;
    std::map<uint64_t, Memory> device, host;  // by address
    std::map<uint64_t, size_t> freed;         // addresses of freed device memory, to say so
    std::deque<std::pair<uint64_t, Memory>> quarantine;
    size_t quarantined = 0;
    std::map<std::string, gpusim::Kernel> kernels;
    std::vector<CapturePtr> captures;
    std::vector<Entry> log;
    uint64_t epoch = 0;  // of the log: cleared while a call runs, that call's entry is gone
    std::vector<std::string> misuse;
};

// Never destroyed: Python objects outlive static destructors and still call in.
State& state = *new State;

thread_local std::vector<uint64_t> current;  // the thread's stack of contexts
thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
thread_local bool inside_host_function = false;

// Lets go of Python's GIL for a while, where this thread has it.
struct GilReleased {
    void* saved = nullptr;
    GilReleased() {
        static const auto check = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
        static const auto alive = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "Py_IsInitialized"));
        static const auto save = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
        if (check && alive && save && alive() && check()) saved = save();
    }
    ~GilReleased() {
        static const auto restore = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
        if (saved) restore(saved);
    }
    GilReleased(const GilReleased&) = delete;
};

std::string format(const char* pattern, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(buffer, sizeof buffer, pattern, arguments);
    va_end(arguments);
    return buffer;
}

// One call of the API: its entry in the log, the lock, and the ways it ends.
struct Call {
    const char* name;
    Lock lock;
    uint64_t epoch = 0;
    size_t index = SIZE_MAX;

    Call(const char* name, const void* stream = nullptr, uint64_t pointer = 0, uint64_t bytes = 0)
        : name(name), lock(state.mutex) {
        if (!state.logging) return;
        epoch = state.epoch;
        index = state.log.size();
        state.log.push_back({name, pthread_self(), reinterpret_cast<uint64_t>(stream), pointer, bytes, 0, ""});
    }
    Entry* entry() { return index < state.log.size() && epoch == state.epoch ? &state.log[index] : nullptr; }
    void detail(const std::string& text) {
        if (Entry* own = entry()) own->detail = text;
    }
    void pointer(uint64_t value) {
        if (Entry* own = entry()) own->pointer = value;
    }
    CUresult end(CUresult result) {
        if (Entry* own = entry()) own->result = result;
        return result;
    }
    CUresult misuse(CUresult result, const std::string& why) {
        if (state.misuse.size() < 10000) state.misuse.push_back(std::string(name) + ": " + why);
        return end(result);
    }
    // Starts a call that needs a context. On failure `result` is what to return.
    bool enter(ContextPtr& context, CUresult& result) {
        if (!state.started) {
            result = misuse(CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called");
        } else if (inside_host_function) {
            result = misuse(CUDA_ERROR_NOT_PERMITTED, "a host function must not call the driver");
        } else if (current.empty()) {
            result = misuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current on this thread");
        } else {
            const auto found = state.contexts.find(current.back());
            if (found == state.contexts.end())
                result = misuse(CUDA_ERROR_CONTEXT_IS_DESTROYED, "the current context is destroyed");
            else if ((context = found->second)->broken)
                result = end(context->broken);
            else
                return true;
        }
        return false;
    }
};

#define ENTER \
    ContextPtr context; \
    CUresult refused; \
    if (!call.enter(context, refused)) return refused

uint64_t key(const void* handle) { return reinterpret_cast<uint64_t>(handle); }
template <class T>
T handle(uint64_t id) { return reinterpret_cast<T>(id); }
uint64_t new_id() { return state.next += 16; }

// ---------------------------------------------------------------------------------------------------------- running

// Runs `stream` up to operation `number` on this thread, or waits for the thread that does. Entered and left locked.
// Dependencies always point to operations queued before, so two threads can never wait for each other.
void run_until(Lock& lock, const StreamPtr& stream, uint64_t number) {
    while (stream->completed < number) {
        if (stream->running) {
            state.changed.wait(lock);
            continue;
        }
        if (stream->queue.empty()) return;
        OperationPtr operation = stream->queue.front();
        stream->queue.pop_front();
        stream->running = operation;
        for (const auto& [other, until] : operation->after) run_until(lock, other, until);
        const uint64_t reached = operation->number;
        CUresult result = stream->context->broken;
        lock.unlock();
        if (!result) result = operation->run();
        lock.lock();
        if (result && !stream->context->broken) stream->context->broken = result;
        stream->running.reset();
        stream->completed = reached;
        state.changed.notify_all();
        lock.unlock();
        operation.reset();  // may free what it holds
        lock.lock();
    }
}

void synchronize(Lock& lock, const StreamPtr& stream) {
    const uint64_t until = stream->submitted;
    if (stream->completed >= until) return;
    lock.unlock();
    {
        GilReleased released;
        lock.lock();
        run_until(lock, stream, until);
        lock.unlock();
    }
    lock.lock();
}

std::vector<StreamPtr> streams_of(const ContextPtr& context) {
    std::vector<StreamPtr> found{context->null_stream};
    for (const auto& [id, stream] : state.streams)
        if (stream->context == context) found.push_back(stream);
    return found;
}

void synchronize(Lock& lock, const ContextPtr& context) {
    for (const StreamPtr& stream : streams_of(context)) synchronize(lock, stream);
}

void invalidate(const CapturePtr& capture) { capture->invalid = true; }

// Streams of a context that capture; only `blocking` ones conflict with the null stream.
bool capturing(const ContextPtr& context, bool only_blocking, bool then_invalidate) {
    bool found = false;
    for (const StreamPtr& stream : streams_of(context))
        if (stream->capture && (stream->blocking || !only_blocking)) {
            found = true;
            if (then_invalidate) invalidate(stream->capture);
        }
    return found;
}

// What CUDA calls potentially unsafe calls: prohibited by this thread's own capture unless that is relaxed, and by
// other threads' captures in global mode (cuThreadExchangeStreamCaptureMode). They spoil those captures.
CUresult unsafe_while_capturing(Call& call) {
    if (capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
    bool found = false;
    for (const CapturePtr& capture : state.captures) {
        const bool own = pthread_equal(capture->thread, pthread_self());
        const bool prohibits = own ? capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED
                                   : capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
                                         capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (prohibits) {
            invalidate(capture);
            found = true;
        }
    }
    if (!found) return CUDA_SUCCESS;
    return call.misuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "not permitted while a stream is capturing");
}

// Queues an operation on a stream, or adds it to the stream's capture.
CUresult enqueue(Call& call, const StreamPtr& stream, OperationPtr operation) {
    if (const CapturePtr capture = stream->capture) {
        if (capture->invalid) return call.end(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        capture->nodes.push_back({operation, stream->tail});
        stream->tail = {capture->nodes.size() - 1};
        return call.end(CUDA_SUCCESS);
    }
    const ContextPtr context = stream->context;
    const bool null = stream == context->null_stream;
    if (null && capturing(context, true, true))
        return call.misuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the null stream was used while a stream captures");
    if (null) {
        for (const StreamPtr& other : streams_of(context))
            if (other != stream && other->blocking) operation->after.emplace_back(other, other->submitted);
    } else if (stream->blocking) {
        operation->after.emplace_back(context->null_stream, context->null_stream->submitted);
    }
    auto& after = operation->after;
    after.erase(std::remove_if(after.begin(), after.end(), [](const auto& one) {
        return one.first->completed >= one.second;
    }), after.end());
    operation->number = stream->submitted = ++state.number;
    stream->queue.push_back(operation);
    stream->queried = false;
    if (stream->queue.size() >= QUEUE) {
        const uint64_t until = stream->queue[QUEUE / 2]->number;
        call.lock.unlock();
        GilReleased released;
        call.lock.lock();
        run_until(call.lock, stream, until);
        call.lock.unlock();  // before the GIL is taken again, lest another thread wait for the lock with the GIL
        return CUDA_SUCCESS;
    }
    return call.end(CUDA_SUCCESS);
}

OperationPtr operation(const char* name, std::function<CUresult()> run) {
    auto made = std::make_shared<Operation>();
    made->name = name;
    made->run = std::move(run);
    return made;
}

// A stream of the current context. On failure null, and `result` is what to return.
StreamPtr find_stream(Call& call, const ContextPtr& context, CUstream given, CUresult& result) {
    if (!given || given == CU_STREAM_LEGACY) return context->null_stream;
    const auto found = state.streams.find(key(given));
    if (found == state.streams.end())
        result = call.misuse(CUDA_ERROR_INVALID_HANDLE, format("%p is no live stream", static_cast<void*>(given)));
    else if (found->second->context != context)
        result = call.misuse(CUDA_ERROR_INVALID_HANDLE, "the stream belongs to another context");
    else
        return found->second;
    return nullptr;
}

#define STREAM(given) \
    const StreamPtr stream = find_stream(call, context, given, refused); \
    if (!stream) return refused

template <class T>
std::shared_ptr<T> find_object(Call& call, std::unordered_map<uint64_t, std::shared_ptr<T>>& table,
                               const ContextPtr& context, const void* given, const char* what, CUresult& result) {
    const auto found = table.find(key(given));
    if (found == table.end())
        result = call.misuse(CUDA_ERROR_INVALID_HANDLE, format("%p is no live %s", given, what));
    else if (context && found->second->context != context)
        result = call.misuse(CUDA_ERROR_INVALID_HANDLE, format("the %s belongs to another context", what));
    else
        return found->second;
    return nullptr;
}

// ----------------------------------------------------------------------------------------------------------- memory

std::map<uint64_t, Memory>::iterator find_memory(std::map<uint64_t, Memory>& memory, uint64_t address) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return memory.end();
    --after;
    return address < after->first + std::max<size_t>(after->second.bytes, 1) ? after : memory.end();
}

// Why [address, address + bytes) is not memory that the device may use; empty: it is.
std::string wrong_device_range(uint64_t address, size_t bytes, const ContextPtr& context) {
    auto found = find_memory(state.device, address);
    if (found == state.device.end()) {
        found = find_memory(state.host, address);  // pinned memory has the same address on the device
        if (found == state.host.end()) {
            const auto gone = state.freed.upper_bound(address);
            const bool was = gone != state.freed.begin() &&
                             address < std::prev(gone)->first + std::prev(gone)->second;
            return format("0x%llx is %s", static_cast<unsigned long long>(address),
                          was ? "freed device memory" : "in no live device allocation");
        }
    }
    const Memory& memory = found->second;
    if (context && memory.context != context) return "the memory belongs to another context";
    if (address + bytes > found->first + memory.bytes)
        return format("%zu bytes from 0x%llx end %llu beyond their allocation of %zu", bytes,
                      static_cast<unsigned long long>(address),
                      static_cast<unsigned long long>(address + bytes - found->first - memory.bytes), memory.bytes);
    return "";
}

// Why a host range is wrong. Ordinary host memory cannot be checked; pinned memory can.
std::string wrong_host_range(const void* host, size_t bytes) {
    if (!host) return "the host pointer is null";
    const auto found = find_memory(state.host, key(host));
    if (found != state.host.end() && key(host) + bytes > found->first + found->second.bytes)
        return format("%zu bytes from %p end beyond their pinned allocation of %zu", bytes, host, found->second.bytes);
    return "";
}

bool pinned(const void* host) { return find_memory(state.host, key(host)) != state.host.end(); }

// A file of garbage, mapped again and again where writing garbage would cost real memory.
int garbage_file() {
    static const int file = [] {
        const int made = memfd_create("gpusim", 0);
        std::vector<char> garbage(LARGE, char(NEW));
        if (made < 0 || write(made, garbage.data(), LARGE) != ssize_t(LARGE)) return -1;
        return made;
    }();
    return file;
}

// fence | data, rounded up to ALIGNMENT | fence | a page nobody may touch
bool map_memory(size_t bytes, Memory& memory, uint64_t& address) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const size_t usable = (rounded + 2 * FENCE + page - 1) / page * page;
    void* mapping = mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                         -1, 0);
    if (mapping == MAP_FAILED) return false;
    char* start = static_cast<char*>(mapping);
    mprotect(start + usable, page, PROT_NONE);
    if (usable >= LARGE && garbage_file() >= 0) {
        for (size_t done = 0; done < usable; done += LARGE)
            mmap(start + done, std::min(LARGE, usable - done), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, garbage_file(), 0);
    } else {
        memset(start, NEW, usable);
    }
    char* data = start + usable - FENCE - rounded;
    memset(data - FENCE, CANARY, FENCE);
    memset(data + bytes, CANARY, rounded - bytes + FENCE);
    memory.bytes = bytes;
    memory.mapping = start;
    memory.mapped = usable + page;
    address = key(data);
    return true;
}

std::string broken_fence(uint64_t address, const Memory& memory) {
    const auto* data = reinterpret_cast<const unsigned char*>(address);
    const auto* end = reinterpret_cast<const unsigned char*>(memory.mapping + memory.mapped) -
                      size_t(sysconf(_SC_PAGESIZE));
    for (const unsigned char* byte = data + memory.bytes; byte < end; ++byte)
        if (*byte != CANARY)
            return format("something wrote %zu bytes past the end of an allocation of %zu",
                          size_t(byte - data - memory.bytes) + 1, memory.bytes);
    for (const unsigned char* byte = data - FENCE; byte < data; ++byte)
        if (*byte != CANARY)
            return format("something wrote %zu bytes before an allocation of %zu", size_t(data - byte), memory.bytes);
    return "";
}

void unmap_memory(const Memory& memory) { munmap(memory.mapping, memory.mapped); }

// Takes device memory from the books, checks its fences, poisons it.
void free_device(Call& call, std::map<uint64_t, Memory>::iterator found) {
    const auto [address, memory] = *found;
    state.device.erase(found);
    state.used -= memory.bytes;
    state.freed[address] = memory.bytes;
    const std::string why = broken_fence(address, memory);
    if (!why.empty()) call.misuse(CUDA_SUCCESS, why);
    if (memory.mapped >= LARGE) return unmap_memory(memory);
    memset(reinterpret_cast<void*>(address), FREED, memory.bytes);
    state.quarantine.emplace_back(address, memory);
    state.quarantined += memory.mapped;
    while (state.quarantined > QUARANTINE) {
        const auto [old, rest] = state.quarantine.front();
        state.quarantine.pop_front();
        state.quarantined -= rest.mapped;
        const auto* data = reinterpret_cast<const unsigned char*>(old);
        for (size_t index = 0; index < rest.bytes; ++index)
            if (data[index] != FREED) {
                call.misuse(CUDA_SUCCESS, format("freed device memory 0x%llx was written to",
                                                 static_cast<unsigned long long>(old)));
                break;
            }
        unmap_memory(rest);
    }
}

CUresult allocate(Call& call, const ContextPtr& context, uint64_t& address, size_t bytes) {
    if (!bytes) return call.misuse(CUDA_ERROR_INVALID_VALUE, "an allocation of 0 bytes");
    if (bytes > state.total || state.used > state.total - bytes) return call.end(CUDA_ERROR_OUT_OF_MEMORY);
    Memory memory;
    if (!map_memory(bytes, memory, address)) return call.end(CUDA_ERROR_OUT_OF_MEMORY);
    memory.context = context;
    state.used += bytes;
    for (auto near = state.freed.lower_bound(address); near != state.freed.end() && near->first < address + bytes;)
        near = state.freed.erase(near);
    state.device[address] = memory;
    call.pointer(address);
    return call.end(CUDA_SUCCESS);
}

CUresult allocate_host(Call& call, const ContextPtr& context, void** out, size_t bytes, unsigned flags) {
    if (!out || !bytes) return call.misuse(CUDA_ERROR_INVALID_VALUE, "an allocation of 0 bytes");
    Memory memory;
    uint64_t address;
    if (!map_memory(bytes, memory, address)) return call.end(CUDA_ERROR_OUT_OF_MEMORY);
    memory.context = context;
    memory.flags = flags;
    state.host[address] = memory;
    *out = handle<void*>(address);
    call.pointer(address);
    return call.end(CUDA_SUCCESS);
}

void forget_host(Call& call, std::map<uint64_t, Memory>::iterator found) {
    const auto [address, memory] = *found;
    state.host.erase(found);
    if (memory.registered) return;
    const std::string why = broken_fence(address, memory);
    if (!why.empty()) call.misuse(CUDA_SUCCESS, why);
    unmap_memory(memory);
}

// Checks a device range again when queued work comes to use it: a graph may run long after what it uses was freed.
CUresult check_late(const char* name, uint64_t address, size_t bytes, const ContextPtr& context) {
    Lock lock(state.mutex);
    const std::string why = wrong_device_range(address, bytes, context);
    if (why.empty()) return CUDA_SUCCESS;
    state.misuse.push_back(std::string(name) + ", when it ran: " + why);
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

enum Direction { TO_DEVICE, TO_HOST, ON_DEVICE };

CUresult copy(Call& call, Direction direction, uint64_t to, uint64_t from, size_t bytes, CUstream given, bool async) {
    ENTER;
    STREAM(given);
    if (!bytes) return call.end(CUDA_SUCCESS);
    std::string why;
    if (direction != TO_HOST) why = wrong_device_range(to, bytes, context);
    else why = wrong_host_range(handle<void*>(to), bytes);
    if (why.empty()) {
        if (direction != TO_DEVICE) why = wrong_device_range(from, bytes, context);
        else why = wrong_host_range(handle<void*>(from), bytes);
    }
    if (!why.empty()) return call.misuse(CUDA_ERROR_INVALID_VALUE, why);
    const char* name = call.name;
    bool wait = !async && direction != ON_DEVICE;
    std::shared_ptr<std::vector<char>> staged;
    if (async && !stream->capture) {
        // The driver stages pageable memory: it has read the source when the call returns, and it waits for a result.
        if (direction == TO_DEVICE && !pinned(handle<void*>(from))) {
            staged = std::make_shared<std::vector<char>>(handle<char*>(from), handle<char*>(from) + bytes);
            call.detail("pageable");
        }
        if (direction == TO_HOST && !pinned(handle<void*>(to))) {
            wait = true;
            call.detail("pageable");
        }
    }
    const uint64_t host = direction == TO_HOST ? to : from;
    const bool was_pinned = direction != ON_DEVICE && pinned(handle<void*>(host));
    const auto queued = operation(name, [=] {
        CUresult late = CUDA_SUCCESS;
        if (was_pinned) late = check_late(name, host, bytes, context);
        if (!late && direction != TO_HOST) late = check_late(name, to, bytes, context);
        if (!late && direction != TO_DEVICE) late = check_late(name, from, bytes, context);
        if (!late) memmove(handle<void*>(to), staged ? staged->data() : handle<const char*>(from), bytes);
        return late;
    });
    const CUresult result = enqueue(call, stream, queued);
    if (result || !wait) return result;
    if (!call.lock.owns_lock()) call.lock.lock();
    synchronize(call.lock, stream);
    return call.end(context->broken);
}

template <class T>
CUresult fill(Call& call, uint64_t to, size_t pitch, T value, size_t width, size_t height, CUstream given) {
    ENTER;
    STREAM(given);
    if (!width || !height) return call.end(CUDA_SUCCESS);
    const size_t bytes = (height - 1) * pitch + width * sizeof(T);
    const std::string why = to % sizeof(T) ? "the address is misaligned" : wrong_device_range(to, bytes, context);
    if (!why.empty()) return call.misuse(CUDA_ERROR_INVALID_VALUE, why);
    const char* name = call.name;
    return enqueue(call, stream, operation(name, [=] {
        const CUresult late = check_late(name, to, bytes, context);
        for (size_t row = 0; !late && row < height; ++row)
            std::fill_n(reinterpret_cast<T*>(to + row * pitch), width, value);
        return late;
    }));
}

// ---------------------------------------------------------------------------------------------------------- kernels

size_t image_size(const unsigned char* image) {
    if (!memcmp(image, "\177ELF", 4)) {
        uint64_t sections;
        uint16_t machine, size, count;
        memcpy(&machine, image + 18, 2);
        memcpy(&sections, image + 40, 8);
        memcpy(&size, image + 58, 2);
        memcpy(&count, image + 60, 2);
        return machine == 190 ? sections + size_t(size) * count : 0;  // 190: EM_CUDA
    }
    uint32_t magic;
    memcpy(&magic, image, 4);
    if (magic == 0xBA55ED50) {  // fatbin
        uint16_t header;
        uint64_t body;
        memcpy(&header, image + 6, 2);
        memcpy(&body, image + 8, 8);
        return header + body;
    }
    return 0;
}

CUresult load_module(Call& call, CUmodule* out, const void* image) {
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    if (!out || !image) return call.misuse(CUDA_ERROR_INVALID_VALUE, "no image");
    auto module = std::make_shared<Module>();
    module->context = context;
    const char* text = static_cast<const char*>(image);
    if (const size_t bytes = strnlen(text, 16) < 16 || text[0] == '\177' || (text[0] & 0x80)
                                 ? image_size(static_cast<const unsigned char*>(image)) : 0) {
        module->image.assign(text, bytes);
        module->text = false;
    } else {
        module->image = text;
        module->text = true;
        static const std::regex header("^(\\s|//[^\\n]*\\n|/\\*[^*]*\\*/)*\\.version\\s+(\\d+)\\.(\\d+)");
        static const std::regex target("\\.target\\s+sm_(\\d+)");
        const std::string start = module->image.substr(0, 4096);
        std::smatch match;
        if (!std::regex_search(start, match, header))
            return call.misuse(CUDA_ERROR_INVALID_IMAGE, "neither PTX, nor a cubin, nor a fatbin");
        // CUDA 12.x came with PTX 8.x, CUDA 13.x with 9.x; the minor numbers are off by one at most.
        const int isa = std::stoi(match[2]) * 1000 + std::stoi(match[3]) * 10;
        if (isa > state.version - 4000)
            return call.misuse(CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
                               format("PTX %d.%d is newer than the driver's CUDA %d.%d", isa / 1000, isa % 1000 / 10,
                                      state.version / 1000, state.version % 1000 / 10));
        if (!std::regex_search(start, match, target))
            return call.misuse(CUDA_ERROR_INVALID_PTX, "the PTX names no target");
        if (std::stoi(match[1]) > state.major * 10 + state.minor)
            return call.misuse(CUDA_ERROR_INVALID_PTX, "the PTX is for sm_" + match[1].str() + ", newer than the GPU");
    }
    const uint64_t id = new_id();
    state.modules[id] = module;
    *out = handle<CUmodule>(id);
    return call.end(CUDA_SUCCESS);
}

// Sizes of an .entry's parameters. False where the PTX has no such entry.
bool ptx_parameters(const std::string& ptx, const std::string& name, std::vector<size_t>& sizes) {
    std::smatch match;
    if (!std::regex_search(ptx, match, std::regex("\\.entry\\s+" + name + "\\s*\\(([^)]*)\\)"))) return false;
    const std::string list = match[1];
    static const std::regex one("\\.param\\s[^,]*\\.[a-z](\\d+)\\s[^,]*?([\\w$]+)(\\[(\\d+)\\])?\\s*(,|$)");
    for (std::sregex_iterator found(list.begin(), list.end(), one), end; found != end; ++found)
        sizes.push_back(std::stoul((*found)[1]) / 8 * ((*found)[4].matched ? std::stoul((*found)[4]) : 1));
    return true;
}

CUresult launch(Call& call, Function& function, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared,
                const StreamPtr& stream, void** parameters, const unsigned char* packed, size_t packed_bytes) {
    static const unsigned max_block[3] = {1024, 1024, 64}, max_grid[3] = {2147483647, 65535, 65535};
    call.detail(format("%s <<<(%u, %u, %u), (%u, %u, %u)>>>", function.name.c_str(), grid[0], grid[1], grid[2],
                       block[0], block[1], block[2]));
    for (int axis = 0; axis < 3; ++axis)
        if (!grid[axis] || !block[axis] || grid[axis] > max_grid[axis] || block[axis] > max_block[axis])
            return call.misuse(CUDA_ERROR_INVALID_VALUE, format("%s: grid (%u, %u, %u) of blocks (%u, %u, %u)",
                function.name.c_str(), grid[0], grid[1], grid[2], block[0], block[1], block[2]));
    if (uint64_t(block[0]) * block[1] * block[2] > 1024)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, format("%s: a block of %u × %u × %u threads, more than 1024",
            function.name.c_str(), block[0], block[1], block[2]));
    if (shared > 48 * 1024) return call.misuse(CUDA_ERROR_INVALID_VALUE, "more than 48 KB of shared memory");
    const gpusim::Kernel kernel = function.kernel;
    auto values = std::make_shared<std::vector<std::vector<max_align_t>>>();
    size_t offset = 0;
    for (size_t index = 0; index < kernel.count; ++index) {
        const gpusim::Parameter& parameter = kernel.parameters[index];
        offset = (offset + parameter.alignment - 1) / parameter.alignment * parameter.alignment;
        const void* source = parameters ? parameters[index] : packed + offset;
        offset += parameter.size;
        if (!parameters && offset > packed_bytes)
            return call.misuse(CUDA_ERROR_INVALID_VALUE, format("%s: %zu bytes of parameters where it takes more",
                function.name.c_str(), packed_bytes));
        if (!source) return call.misuse(CUDA_ERROR_INVALID_VALUE, "a parameter is missing");
        values->emplace_back(parameter.size / sizeof(max_align_t) + 1);
        memcpy(values->back().data(), source, parameter.size);
    }
    if (!parameters && packed_bytes > (offset + 7) / 8 * 8)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, format("%s: %zu bytes of parameters where it takes %zu",
            function.name.c_str(), packed_bytes, offset));
    const ContextPtr context = function.context;
    // A null pointer may be an argument left out. A wrong one is noticed by the real GPU only when the kernel runs,
    // and ends the context there: every later call fails.
    const auto check = [kernel, values, context, name = function.name]() -> std::string {
        for (size_t index = 0; index < kernel.count; ++index) {
            const uint64_t address = *reinterpret_cast<const uint64_t*>((*values)[index].data());
            if (!kernel.parameters[index].pointer || !address) continue;
            const std::string why = wrong_device_range(address, 1, context);
            if (!why.empty()) return format("%s: argument %zu: ", name.c_str(), index) + why;
        }
        return "";
    };
    const std::string why = check();
    if (!why.empty()) call.misuse(CUDA_SUCCESS, why);
    std::array<unsigned, 3> grids{grid[0], grid[1], grid[2]}, blocks{block[0], block[1], block[2]};
    return enqueue(call, stream, operation("kernel", [=, known = !why.empty()] {
        {
            Lock lock(state.mutex);
            const std::string late = check();
            if (!late.empty()) {
                if (!known) state.misuse.push_back("kernel, when it ran: " + late);
                return CUDA_ERROR_ILLEGAL_ADDRESS;
            }
        }
        std::vector<const void*> arguments;
        for (const auto& value : *values) arguments.push_back(value.data());
        kernel.run(arguments.data(), grids.data(), blocks.data());
        return CUDA_SUCCESS;
    }));
}

CUresult launch_stored(Call& call, CUfunction given, int width, int height, CUstream given_stream) {
    ENTER;
    STREAM(given_stream);
    const auto function = find_object(call, state.functions, context, given, "function", refused);
    if (!function) return refused;
    const unsigned grid[3] = {unsigned(width), unsigned(height), 1};
    return launch(call, *function, grid, function->block, function->shared, stream, nullptr,
                  function->parameters.data(), function->parameters.size());
}

// --------------------------------------------------------------------------------------------------------- contexts

ContextPtr make_context(CUdevice device, unsigned flags, bool primary) {
    auto context = std::make_shared<Context>();
    context->id = new_id();
    context->device = device;
    context->flags = flags;
    context->primary = primary;
    context->null_stream = std::make_shared<Stream>();
    context->null_stream->id = 0;
    context->null_stream->context = context;
    state.contexts[context->id] = context;
    return context;
}

template <class T>
void drop_of(T& table, const ContextPtr& context) {
    for (auto one = table.begin(); one != table.end();)
        if (one->second->context == context) {
            one = table.erase(one);
            ++state.abandoned;
        } else {
            ++one;
        }
}

void destroy_context(Call& call, const ContextPtr& context) {
    synchronize(call.lock, context);
    for (const StreamPtr& stream : streams_of(context))
        if (stream->capture) {
            auto& captures = state.captures;
            captures.erase(std::remove(captures.begin(), captures.end(), stream->capture), captures.end());
            stream->capture.reset();
        }
    for (auto one = state.device.begin(); one != state.device.end();) {
        const auto next = std::next(one);
        if (one->second.context == context) {
            free_device(call, one);
            ++state.abandoned;
        }
        one = next;
    }
    for (auto one = state.host.begin(); one != state.host.end();) {
        const auto next = std::next(one);
        if (one->second.context == context) {
            forget_host(call, one);
            ++state.abandoned;
        }
        one = next;
    }
    drop_of(state.streams, context);
    drop_of(state.events, context);
    drop_of(state.graphs, context);
    drop_of(state.executables, context);
    drop_of(state.modules, context);
    for (auto one = state.functions.begin(); one != state.functions.end();)
        one = one->second->context == context ? state.functions.erase(one) : std::next(one);
    state.contexts.erase(context->id);
    context->null_stream->context.reset();  // a cycle
}

bool bad_device(CUdevice device) { return device < 0 || device >= state.devices; }

#define STARTED \
    if (!state.started) return call.misuse(CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called")
#define DEVICE(device) \
    STARTED; \
    if (bad_device(device)) return call.misuse(CUDA_ERROR_INVALID_DEVICE, format("there is no device %d", device))

struct ErrorName {
    CUresult code;
    const char *name, *text;
};
const ErrorName ERRORS[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {CUDA_ERROR_FILE_NOT_FOUND, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {CUDA_ERROR_NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "capture was not ended in the same stream as it began"},
    {CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
     "capturing stream has unjoined work"},
    {CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CUDA_ERROR_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a "
                                                             "capturing stream"},
    {CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

}  // namespace

// -------------------------------------------------------------------------------------------- the driver's functions

static void gpusim_here() {}

EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
    for (const ErrorName& one : ERRORS)
        if (one.code == error) return *text = one.text, CUDA_SUCCESS;
    *text = "unrecognized error code";  // the real one writes null, on which pycuda crashes
    return CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuGetErrorName(CUresult error, const char** name) {
    for (const ErrorName& one : ERRORS)
        if (one.code == error) return *name = one.name, CUDA_SUCCESS;
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuInit(unsigned flags) {
    Call call("cuInit");
    if (flags) return call.misuse(CUDA_ERROR_INVALID_VALUE, "flags must be 0");
    if (!state.devices) return call.end(CUDA_ERROR_NO_DEVICE);
    state.started = true;
    return call.end(CUDA_SUCCESS);
}
// How cuda.bindings finds every function: the newest that this driver has under the name.
EXPORT CUresult cuGetProcAddress_v2(const char* symbol, void** found, int version, cuuint64_t flags,
                                    CUdriverProcAddressQueryResult* status) {
    static void* const own = [] {
        Dl_info info;
        dladdr(reinterpret_cast<void*>(&gpusim_here), &info);
        return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    }();
    *found = nullptr;
    for (const char* suffix : {"_v4", "_v3", "_v2", ""})
        if ((*found = dlsym(own, (std::string(symbol) + suffix).c_str()))) break;
    if (status) *status = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
EXPORT CUresult cuDriverGetVersion(int* version) {
    Lock lock(state.mutex);
    *version = state.version;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetCount(int* count) {
    Call call("cuDeviceGetCount");
    STARTED;
    *count = state.devices;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    Call call("cuDeviceGet");
    DEVICE(ordinal);
    *device = ordinal;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    Call call("cuDeviceGetName");
    DEVICE(device);
    snprintf(name, size_t(length), "Simulated GPU");
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
    Call call("cuDeviceGetPCIBusId");
    DEVICE(device);
    snprintf(id, size_t(length), "0000:%02x:00.0", unsigned(device) + 1);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuDeviceGetByPCIBusId(CUdevice* device, const char* id) {
    Call call("cuDeviceGetByPCIBusId");
    STARTED;
    unsigned bus = 0;
    if (sscanf(id, "%*x:%x:", &bus) != 1 || bad_device(int(bus) - 1)) return call.end(CUDA_ERROR_INVALID_DEVICE);
    *device = int(bus) - 1;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
    Call call("cuDeviceComputeCapability");
    DEVICE(device);
    *major = state.major;
    *minor = state.minor;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    Call call("cuDeviceTotalMem");
    DEVICE(device);
    *bytes = state.total;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    Call call("cuDeviceGetAttribute");
    DEVICE(device);
    static const std::map<int, int> known = {
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024}, {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024}, {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647}, {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535}, {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
        {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32}, {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 2},
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 1536}, {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1000000},
        {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536}, {CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 65536},
        {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1}, {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
        {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1}, {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 2},
        {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 128}, {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 1000000},
        {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 4 << 20},
    };
    const auto found = known.find(attribute);
    if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = state.major;
    else if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *value = state.minor;
    else *value = found == known.end() ? 0 : found->second;
    return call.end(CUDA_SUCCESS);
}

namespace {
CUresult create_context(CUcontext* out, unsigned flags, CUdevice device) {
    Call call("cuCtxCreate");
    DEVICE(device);
    const ContextPtr context = make_context(device, flags, false);
    current.push_back(context->id);
    *out = handle<CUcontext>(context->id);
    return call.end(CUDA_SUCCESS);
}
}  // namespace

EXPORT CUresult cuCtxCreate_v2(CUcontext* out, unsigned flags, CUdevice device) {
    return create_context(out, flags, device);
}
EXPORT CUresult cuCtxCreate_v4(CUcontext* out, CUctxCreateParams*, unsigned flags, CUdevice device) {
    return create_context(out, flags, device);
}
EXPORT CUresult cuCtxDestroy_v2(CUcontext given) {
    Call call("cuCtxDestroy");
    const auto found = state.contexts.find(key(given));
    if (found == state.contexts.end()) return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "no live context");
    if (found->second->primary) return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "a primary context is released instead");
    const ContextPtr context = found->second;
    destroy_context(call, context);
    if (!current.empty() && current.back() == key(given)) current.pop_back();
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuCtxAttach(CUcontext* out, unsigned) {
    Call call("cuCtxAttach");
    ENTER;
    ++context->uses;
    *out = handle<CUcontext>(context->id);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuCtxDetach(CUcontext given) {
    Call call("cuCtxDetach");
    const auto found = state.contexts.find(key(given));
    if (found == state.contexts.end() || current.empty() || current.back() != key(given))
        return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "the context is not current on this thread");
    const ContextPtr context = found->second;
    if (--context->uses) return call.end(CUDA_SUCCESS);
    destroy_context(call, context);
    current.pop_back();
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuCtxPushCurrent_v2(CUcontext given) {
    Call call("cuCtxPushCurrent");
    if (!state.contexts.count(key(given))) return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "no live context");
    current.push_back(key(given));
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* out) {
    Call call("cuCtxPopCurrent");
    if (current.empty()) return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current on this thread");
    if (out) *out = handle<CUcontext>(current.back());
    current.pop_back();
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuCtxSetCurrent(CUcontext given) {
    Call call("cuCtxSetCurrent");
    if (given && !state.contexts.count(key(given))) return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "no live context");
    if (!current.empty()) current.pop_back();
    if (given) current.push_back(key(given));
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* out) {
    Call call("cuCtxGetCurrent");
    *out = current.empty() ? nullptr : handle<CUcontext>(current.back());
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
    Call call("cuCtxGetDevice");
    ENTER;
    *device = context->device;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuCtxGetFlags(unsigned* flags) {
    Call call("cuCtxGetFlags");
    ENTER;
    *flags = context->flags;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuCtxGetApiVersion(CUcontext, unsigned* version) {
    *version = 3020;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSynchronize() {
    Call call("cuCtxSynchronize");
    ENTER;
    if (capturing(context, false, true))
        return call.misuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the context was synchronised while a stream captures");
    synchronize(call.lock, context);
    return call.end(context->broken);
}
EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = *greatest = 0;
    return CUDA_SUCCESS;
}
// Limits, caches and banks: accepted, and without effect, as they are hints or unused here.
EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1024, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCacheConfig(CUfunc_cache) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCacheConfig(CUfunc_cache* value) { return *value = CU_FUNC_CACHE_PREFER_NONE, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetSharedMemConfig(CUsharedconfig) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetSharedMemConfig(CUsharedconfig* value) {
    return *value = CU_SHARED_MEM_CONFIG_FOUR_BYTE_BANK_SIZE, CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice device) {
    Call call("cuDevicePrimaryCtxRetain");
    DEVICE(device);
    for (const auto& [id, context] : state.contexts)
        if (context->primary && context->device == device) {
            ++context->uses;
            *out = handle<CUcontext>(id);
            return call.end(CUDA_SUCCESS);
        }
    *out = handle<CUcontext>(make_context(device, 0, true)->id);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    Call call("cuDevicePrimaryCtxRelease");
    DEVICE(device);
    for (const auto& [id, context] : state.contexts)
        if (context->primary && context->device == device) {
            const ContextPtr found = context;
            if (!--found->uses) destroy_context(call, found);
            return call.end(CUDA_SUCCESS);
        }
    return call.misuse(CUDA_ERROR_INVALID_CONTEXT, "the primary context was released more often than retained");
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    Call call("cuDevicePrimaryCtxGetState");
    DEVICE(device);
    *flags = 0;
    *active = 0;
    for (const auto& [id, context] : state.contexts)
        if (context->primary && context->device == device) *active = 1;
    return call.end(CUDA_SUCCESS);
}

// memory

EXPORT CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    Call call("cuMemGetInfo");
    ENTER;
    *total = state.total;
    *free = state.total - std::min(state.used, state.total);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) {
    Call call("cuMemAlloc", nullptr, 0, bytes);
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    uint64_t address;
    const CUresult result = allocate(call, context, address, bytes);
    if (!result) *out = address;
    return result;
}
EXPORT CUresult cuMemAllocPitch_v2(CUdeviceptr* out, size_t* pitch, size_t width, size_t height, unsigned element) {
    Call call("cuMemAllocPitch", nullptr, 0, width * height);
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    if (element != 4 && element != 8 && element != 16)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, "elements of 4, 8 or 16 bytes");
    uint64_t address;
    *pitch = (width + 511) / 512 * 512;
    const CUresult result = allocate(call, context, address, *pitch * height);
    if (!result) *out = address;
    return result;
}
EXPORT CUresult cuMemFree_v2(CUdeviceptr given) {
    Call call("cuMemFree", nullptr, given);
    if (!given) return call.end(CUDA_SUCCESS);
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    auto found = state.device.find(given);
    if (found == state.device.end())
        return call.misuse(CUDA_ERROR_INVALID_VALUE,
                           format("0x%llx %s", static_cast<unsigned long long>(given),
                                  state.freed.count(given) ? "was freed before" : "is not the start of an allocation"));
    if (found->second.context != context)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, "the memory belongs to another context");
    synchronize(call.lock, context);  // the real cuMemFree waits for all work too
    found = state.device.find(given);
    if (found == state.device.end()) return call.misuse(CUDA_ERROR_INVALID_VALUE, "freed by two threads at once");
    free_device(call, found);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr given) {
    Call call("cuMemGetAddressRange", nullptr, given);
    ENTER;
    const auto found = find_memory(state.device, given);
    if (found == state.device.end()) return call.misuse(CUDA_ERROR_NOT_FOUND, "in no live device allocation");
    if (base) *base = found->first;
    if (bytes) *bytes = found->second.bytes;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuMemHostAlloc(void** out, size_t bytes, unsigned flags) {
    Call call("cuMemHostAlloc", nullptr, 0, bytes);
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    return allocate_host(call, context, out, bytes, flags);
}
EXPORT CUresult cuMemAllocHost_v2(void** out, size_t bytes) {
    Call call("cuMemAllocHost", nullptr, 0, bytes);
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    return allocate_host(call, context, out, bytes, 0);
}
EXPORT CUresult cuMemFreeHost(void* given) {
    Call call("cuMemFreeHost", nullptr, key(given));
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    auto found = state.host.find(key(given));
    if (found == state.host.end() || found->second.registered)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, format("%p is not the start of pinned memory", given));
    synchronize(call.lock, found->second.context);
    found = state.host.find(key(given));
    if (found != state.host.end()) forget_host(call, found);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuMemHostRegister_v2(void* given, size_t bytes, unsigned flags) {
    Call call("cuMemHostRegister", nullptr, key(given), bytes);
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    if (!given || !bytes) return call.misuse(CUDA_ERROR_INVALID_VALUE, "nothing to register");
    const auto next = state.host.lower_bound(key(given));
    if (find_memory(state.host, key(given)) != state.host.end() ||
        (next != state.host.end() && next->first < key(given) + bytes))
        return call.misuse(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, format("%p is pinned already", given));
    Memory memory;
    memory.bytes = bytes;
    memory.context = context;
    memory.flags = flags;
    memory.registered = true;
    state.host[key(given)] = memory;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuMemHostUnregister(void* given) {
    Call call("cuMemHostUnregister", nullptr, key(given));
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    auto found = state.host.find(key(given));
    if (found == state.host.end() || !found->second.registered)
        return call.misuse(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, format("%p is not registered", given));
    synchronize(call.lock, found->second.context);
    state.host.erase(key(given));
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* given, unsigned) {
    Call call("cuMemHostGetDevicePointer", nullptr, key(given));
    ENTER;
    if (!pinned(given)) return call.misuse(CUDA_ERROR_INVALID_VALUE, format("%p is not pinned", given));
    *out = key(given);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuMemHostGetFlags(unsigned* flags, void* given) {
    Call call("cuMemHostGetFlags", nullptr, key(given));
    ENTER;
    const auto found = find_memory(state.host, key(given));
    if (found == state.host.end()) return call.misuse(CUDA_ERROR_INVALID_VALUE, format("%p is not pinned", given));
    *flags = found->second.flags;
    return call.end(CUDA_SUCCESS);
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    Call call("cuMemcpyHtoD", nullptr, to, bytes);
    return copy(call, TO_DEVICE, to, key(from), bytes, nullptr, false);
}
EXPORT CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    Call call("cuMemcpyDtoH", nullptr, from, bytes);
    return copy(call, TO_HOST, key(to), from, bytes, nullptr, false);
}
EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    Call call("cuMemcpyDtoD", nullptr, to, bytes);
    return copy(call, ON_DEVICE, to, from, bytes, nullptr, false);
}
EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    Call call("cuMemcpyHtoDAsync", stream, to, bytes);
    return copy(call, TO_DEVICE, to, key(from), bytes, stream, true);
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    Call call("cuMemcpyDtoHAsync", stream, from, bytes);
    return copy(call, TO_HOST, key(to), from, bytes, stream, true);
}
EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    Call call("cuMemcpyDtoDAsync", stream, to, bytes);
    return copy(call, ON_DEVICE, to, from, bytes, stream, true);
}

#define FILLS(type, bits) \
    EXPORT CUresult cuMemsetD##bits##_v2(CUdeviceptr to, type value, size_t count) { \
        Call call("cuMemsetD" #bits, nullptr, to, count * sizeof(type)); \
        return fill<type>(call, to, 0, value, count, 1, nullptr); \
    } \
    EXPORT CUresult cuMemsetD##bits##Async(CUdeviceptr to, type value, size_t count, CUstream stream) { \
        Call call("cuMemsetD" #bits "Async", stream, to, count * sizeof(type)); \
        return fill<type>(call, to, 0, value, count, 1, stream); \
    } \
    EXPORT CUresult cuMemsetD2D##bits##_v2(CUdeviceptr to, size_t pitch, type value, size_t width, size_t height) { \
        Call call("cuMemsetD2D" #bits, nullptr, to, width * height * sizeof(type)); \
        return fill<type>(call, to, pitch, value, width, height, nullptr); \
    } \
    EXPORT CUresult cuMemsetD2D##bits##Async(CUdeviceptr to, size_t pitch, type value, size_t width, size_t height, \
                                             CUstream stream) { \
        Call call("cuMemsetD2D" #bits "Async", stream, to, width * height * sizeof(type)); \
        return fill<type>(call, to, pitch, value, width, height, stream); \
    }
FILLS(unsigned char, 8)
FILLS(unsigned short, 16)
FILLS(unsigned int, 32)

// streams

namespace {
CUresult create_stream(CUstream* out, unsigned flags, const char* name) {
    Call call(name);
    ENTER;
    if (flags > CU_STREAM_NON_BLOCKING) return call.misuse(CUDA_ERROR_INVALID_VALUE, "unknown flags");
    auto stream = std::make_shared<Stream>();
    stream->id = new_id();
    stream->context = context;
    stream->blocking = flags != CU_STREAM_NON_BLOCKING;
    state.streams[stream->id] = stream;
    *out = handle<CUstream>(stream->id);
    if (Entry* own = call.entry()) own->stream = stream->id;
    return call.end(CUDA_SUCCESS);
}
}  // namespace

EXPORT CUresult cuStreamCreate(CUstream* out, unsigned flags) { return create_stream(out, flags, "cuStreamCreate"); }
EXPORT CUresult cuStreamCreateWithPriority(CUstream* out, unsigned flags, int) {
    return create_stream(out, flags, "cuStreamCreateWithPriority");
}
EXPORT CUresult cuStreamDestroy_v2(CUstream given) {
    Call call("cuStreamDestroy", given);
    ENTER;
    STREAM(given);
    if (stream == context->null_stream) return call.misuse(CUDA_ERROR_INVALID_HANDLE, "the null stream");
    if (stream->capture) {
        invalidate(stream->capture);
        auto& captures = state.captures;
        captures.erase(std::remove(captures.begin(), captures.end(), stream->capture), captures.end());
        stream->capture.reset();
    }
    state.streams.erase(key(given));
    synchronize(call.lock, stream);  // the real one returns at once, and finishes the work by itself
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuStreamSynchronize(CUstream given) {
    Call call("cuStreamSynchronize", given);
    ENTER;
    STREAM(given);
    if (stream->capture) {
        invalidate(stream->capture);
        return call.misuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the stream is capturing");
    }
    if (stream == context->null_stream) {
        if (capturing(context, true, true))
            return call.misuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the null stream, while a stream captures");
        for (const StreamPtr& other : streams_of(context))  // it follows every blocking stream
            if (other->blocking) synchronize(call.lock, other);
    }
    synchronize(call.lock, stream);
    return call.end(context->broken);
}
EXPORT CUresult cuStreamQuery(CUstream given) {
    Call call("cuStreamQuery", given);
    ENTER;
    STREAM(given);
    if (stream->capture) {
        invalidate(stream->capture);
        return call.misuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the stream is capturing");
    }
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    if (stream->completed >= stream->submitted) return call.end(CUDA_SUCCESS);
    // "Not ready" once, so that callers must cope; then the work is done, so that polling ends.
    if (!stream->queried) {
        stream->queried = true;
        return call.end(CUDA_ERROR_NOT_READY);
    }
    synchronize(call.lock, stream);
    return call.end(context->broken);
}
EXPORT CUresult cuStreamGetFlags(CUstream given, unsigned* flags) {
    Call call("cuStreamGetFlags", given);
    ENTER;
    STREAM(given);
    *flags = stream->blocking ? CU_STREAM_DEFAULT : CU_STREAM_NON_BLOCKING;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuStreamGetPriority(CUstream, int* priority) { return *priority = 0, CUDA_SUCCESS; }
EXPORT CUresult cuStreamGetCtx(CUstream given, CUcontext* out) {
    Call call("cuStreamGetCtx", given);
    ENTER;
    STREAM(given);
    *out = handle<CUcontext>(stream->context->id);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuStreamWaitEvent(CUstream given, CUevent given_event, unsigned) {
    Call call("cuStreamWaitEvent", given);
    ENTER;
    STREAM(given);
    const auto event = find_object(call, state.events, nullptr, given_event, "event", refused);
    if (!event) return refused;
    if (event->capture) {
        const CapturePtr capture = event->capture;
        if (stream->capture && stream->capture != capture)
            return invalidate(capture), invalidate(stream->capture),
                   call.misuse(CUDA_ERROR_STREAM_CAPTURE_MERGE, "two captures would be joined");
        if (capture->invalid) return call.end(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        if (stream == context->null_stream) {
            invalidate(capture);
            return call.misuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the null stream cannot join a capture");
        }
        stream->capture = capture;
        stream->tail.insert(event->nodes.begin(), event->nodes.end());
        return call.end(CUDA_SUCCESS);
    }
    if (stream->capture) {
        invalidate(stream->capture);
        return call.misuse(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "a captured wait for an event that was not captured");
    }
    if (!event->record) return call.end(CUDA_SUCCESS);
    const auto wait = operation("cuStreamWaitEvent", [] { return CUDA_SUCCESS; });
    wait->after.emplace_back(event->record->stream, event->record->number);
    return enqueue(call, stream, wait);
}
EXPORT CUresult cuLaunchHostFunc(CUstream given, CUhostFn function, void* data) {
    Call call("cuLaunchHostFunc", given);
    ENTER;
    STREAM(given);
    if (!function) return call.misuse(CUDA_ERROR_INVALID_VALUE, "no function");
    return enqueue(call, stream, operation("cuLaunchHostFunc", [=] {
        inside_host_function = true;
        function(data);
        inside_host_function = false;
        return CUDA_SUCCESS;
    }));
}

// events

EXPORT CUresult cuEventCreate(CUevent* out, unsigned flags) {
    Call call("cuEventCreate");
    ENTER;
    auto event = std::make_shared<Event>();
    event->context = context;
    event->flags = flags;
    const uint64_t id = new_id();
    state.events[id] = event;
    *out = handle<CUevent>(id);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuEventDestroy_v2(CUevent given) {
    Call call("cuEventDestroy");
    ENTER;
    if (!find_object(call, state.events, context, given, "event", refused)) return refused;
    state.events.erase(key(given));
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuEventRecord(CUevent given_event, CUstream given) {
    Call call("cuEventRecord", given);
    ENTER;
    STREAM(given);
    const auto event = find_object(call, state.events, context, given_event, "event", refused);
    if (!event) return refused;
    event->queried = false;
    if (stream->capture) {
        if (stream->capture->invalid) return call.end(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        event->capture = stream->capture;
        event->nodes = stream->tail;
        event->record.reset();
        return call.end(CUDA_SUCCESS);
    }
    const auto record = std::make_shared<Record>();
    record->stream = stream;
    const auto queued = operation("cuEventRecord", [record] {
        record->time = std::chrono::steady_clock::now();
        return CUDA_SUCCESS;
    });
    // The number is the operation's, which enqueue gives; it may run before enqueue returns where the queue is full.
    const CUresult result = enqueue(call, stream, queued);
    if (result) return result;
    if (!call.lock.owns_lock()) call.lock.lock();
    record->number = queued->number;
    event->capture.reset();
    event->record = record;
    return CUDA_SUCCESS;
}
namespace {
CUresult captured(Call& call, const Event& event) {
    invalidate(event.capture);
    return call.misuse(CUDA_ERROR_CAPTURED_EVENT, "the event was last recorded in a capturing stream");
}
}  // namespace
EXPORT CUresult cuEventQuery(CUevent given) {
    Call call("cuEventQuery");
    ENTER;
    const auto event = find_object(call, state.events, context, given, "event", refused);
    if (!event) return refused;
    if (event->capture) return captured(call, *event);
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    const auto record = event->record;
    if (!record || record->stream->completed >= record->number) return call.end(CUDA_SUCCESS);
    if (!event->queried) {
        event->queried = true;
        return call.end(CUDA_ERROR_NOT_READY);
    }
    call.lock.unlock();
    {
        GilReleased released;
        call.lock.lock();
        run_until(call.lock, record->stream, record->number);
        call.lock.unlock();
    }
    call.lock.lock();
    return call.end(context->broken);
}
EXPORT CUresult cuEventSynchronize(CUevent given) {
    Call call("cuEventSynchronize");
    ENTER;
    const auto event = find_object(call, state.events, context, given, "event", refused);
    if (!event) return refused;
    if (event->capture) return captured(call, *event);
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    if (const auto record = event->record) {
        call.lock.unlock();
        {
            GilReleased released;
            call.lock.lock();
            run_until(call.lock, record->stream, record->number);
            call.lock.unlock();
        }
        call.lock.lock();
    }
    return call.end(context->broken);
}
namespace {
CUresult elapsed(float* milliseconds, CUevent first, CUevent second) {
    Call call("cuEventElapsedTime");
    ENTER;
    const auto start = find_object(call, state.events, context, first, "event", refused);
    const auto end = start ? find_object(call, state.events, context, second, "event", refused) : nullptr;
    if (!end) return refused;
    if (!start->record || !end->record || (start->flags | end->flags) & CU_EVENT_DISABLE_TIMING)
        return call.misuse(CUDA_ERROR_INVALID_HANDLE, "an event that was not recorded, or does not keep time");
    if (start->record->stream->completed < start->record->number || end->record->stream->completed < end->record->number)
        return call.end(CUDA_ERROR_NOT_READY);
    *milliseconds = std::chrono::duration<float, std::milli>(end->record->time - start->record->time).count();
    return call.end(CUDA_SUCCESS);
}
}  // namespace
EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return elapsed(milliseconds, start, end);
}
EXPORT CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    return elapsed(milliseconds, start, end);
}

// graphs

EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    std::swap(*mode, capture_mode);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamBeginCapture_v2(CUstream given, CUstreamCaptureMode mode) {
    Call call("cuStreamBeginCapture", given);
    ENTER;
    STREAM(given);
    if (stream == context->null_stream)
        return call.misuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the null stream cannot be captured");
    if (stream->capture) {
        invalidate(stream->capture);
        return call.misuse(CUDA_ERROR_ILLEGAL_STATE, "the stream is capturing already");
    }
    stream->capture = std::make_shared<Capture>();
    stream->capture->mode = mode;
    stream->capture->thread = pthread_self();
    stream->capture->origin = stream;
    stream->tail.clear();
    state.captures.push_back(stream->capture);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuStreamEndCapture(CUstream given, CUgraph* out) {
    Call call("cuStreamEndCapture", given);
    ENTER;
    STREAM(given);
    *out = nullptr;
    const CapturePtr capture = stream->capture;
    if (!capture) return call.misuse(CUDA_ERROR_ILLEGAL_STATE, "the stream is not capturing");
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && !pthread_equal(capture->thread, pthread_self())) {
        invalidate(capture);
        return call.misuse(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "the capture was begun by another thread");
    }
    if (capture->origin != stream) {
        invalidate(capture);
        return call.misuse(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "the capture was begun on another stream");
    }
    std::set<size_t> reached, pending = stream->tail;
    while (!pending.empty()) {
        const size_t node = *pending.begin();
        pending.erase(pending.begin());
        if (!reached.insert(node).second) continue;
        pending.insert(capture->nodes[node].after.begin(), capture->nodes[node].after.end());
    }
    for (const auto& [id, other] : state.streams)
        if (other->capture == capture) {
            other->capture.reset();
            other->tail.clear();
        }
    state.captures.erase(std::remove(state.captures.begin(), state.captures.end(), capture), state.captures.end());
    if (capture->invalid) return call.end(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    if (reached.size() != capture->nodes.size())
        return call.misuse(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "a stream that joined the capture did not come back");
    auto graph = std::make_shared<Graph>();
    graph->context = context;
    for (const Node& node : capture->nodes) graph->operations.push_back(node.operation);
    capture->nodes.clear();  // events may keep the capture, and must not keep its operations
    const uint64_t id = new_id();
    state.graphs[id] = graph;
    *out = handle<CUgraph>(id);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuStreamIsCapturing(CUstream given, CUstreamCaptureStatus* status) {
    Call call("cuStreamIsCapturing", given);
    ENTER;
    STREAM(given);
    if (stream == context->null_stream && capturing(context, true, false))
        return call.end(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    *status = !stream->capture            ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                         : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return call.end(CUDA_SUCCESS);
}
namespace {
CUresult instantiate(CUgraphExec* out, CUgraph given) {
    Call call("cuGraphInstantiate");
    ENTER;
    const auto graph = find_object(call, state.graphs, context, given, "graph", refused);
    if (!graph) return refused;
    auto executable = std::make_shared<Graph>();
    executable->context = graph->context;
    executable->operations = graph->operations;
    const uint64_t id = new_id();
    state.executables[id] = executable;
    *out = handle<CUgraphExec>(id);
    return call.end(CUDA_SUCCESS);
}
}  // namespace
EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* out, CUgraph graph, unsigned long long) {
    return instantiate(out, graph);
}
EXPORT CUresult cuGraphInstantiate_v2(CUgraphExec* out, CUgraph graph, CUgraphNode*, char*, size_t) {
    return instantiate(out, graph);
}
EXPORT CUresult cuGraphLaunch(CUgraphExec given, CUstream given_stream) {
    Call call("cuGraphLaunch", given_stream);
    ENTER;
    STREAM(given_stream);
    const auto graph = find_object(call, state.executables, context, given, "executable graph", refused);
    if (!graph) return refused;
    if (stream->capture)
        return call.misuse(CUDA_ERROR_NOT_SUPPORTED, "the simulation captures no graph launches");
    const auto queued = operation("cuGraphLaunch", [operations = graph->operations] {
        for (const OperationPtr& one : operations)
            if (const CUresult result = one->run()) return result;
        return CUDA_SUCCESS;
    });
    if (graph->launched.first) queued->after.push_back(graph->launched);
    const CUresult result = enqueue(call, stream, queued);
    if (result) return result;
    if (!call.lock.owns_lock()) call.lock.lock();
    graph->launched = {stream, queued->number};
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphExecDestroy(CUgraphExec given) {
    std::shared_ptr<Graph> graph;  // freed after the lock
    Call call("cuGraphExecDestroy");
    ENTER;
    graph = find_object(call, state.executables, context, given, "executable graph", refused);
    if (!graph) return refused;
    state.executables.erase(key(given));
    call.end(CUDA_SUCCESS);
    call.lock.unlock();
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphDestroy(CUgraph given) {
    std::shared_ptr<Graph> graph;
    Call call("cuGraphDestroy");
    ENTER;
    graph = find_object(call, state.graphs, context, given, "graph", refused);
    if (!graph) return refused;
    state.graphs.erase(key(given));
    call.end(CUDA_SUCCESS);
    call.lock.unlock();
    return CUDA_SUCCESS;
}

// modules and kernels

EXPORT CUresult cuModuleLoadData(CUmodule* out, const void* image) {
    Call call("cuModuleLoadData");
    return load_module(call, out, image);
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned count, CUjit_option* options,
                                   void** values) {
    for (unsigned index = 0; index < count; ++index)
        if (options[index] == CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES || options[index] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
            values[index] = nullptr;  // bytes of log written: none
    Call call("cuModuleLoadDataEx");
    return load_module(call, out, image);
}
EXPORT CUresult cuModuleLoadFatBinary(CUmodule* out, const void* image) {
    Call call("cuModuleLoadFatBinary");
    return load_module(call, out, image);
}
EXPORT CUresult cuModuleLoad(CUmodule* out, const char* path) {
    std::ifstream file(path, std::ios::binary);
    const std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    Call call("cuModuleLoad");
    if (!file) return call.end(CUDA_ERROR_FILE_NOT_FOUND);
    return load_module(call, out, image.c_str());
}
EXPORT CUresult cuModuleUnload(CUmodule given) {
    Call call("cuModuleUnload");
    ENTER;
    if (const CUresult result = unsafe_while_capturing(call)) return result;
    if (!find_object(call, state.modules, context, given, "module", refused)) return refused;
    synchronize(call.lock, context);
    state.modules.erase(key(given));
    for (auto one = state.functions.begin(); one != state.functions.end();)
        one = one->second->module == key(given) ? state.functions.erase(one) : std::next(one);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuModuleGetFunction(CUfunction* out, CUmodule given, const char* name) {
    Call call("cuModuleGetFunction");
    ENTER;
    call.detail(name);
    const auto module = find_object(call, state.modules, context, given, "module", refused);
    if (!module) return refused;
    std::vector<size_t> sizes;
    const std::string wanted = name;
    const bool in_image = module->text ? ptx_parameters(module->image, wanted, sizes)
                                       : module->image.find(wanted) != std::string::npos;
    if (!in_image) return call.misuse(CUDA_ERROR_NOT_FOUND, "the image has no kernel " + wanted);
    const auto twin = state.kernels.find(wanted);
    if (twin == state.kernels.end())
        return call.misuse(CUDA_ERROR_NOT_FOUND, "no host kernel " + wanted + "; load_kernels() was not given its .cu");
    std::vector<size_t> own;
    for (size_t index = 0; index < twin->second.count; ++index) own.push_back(twin->second.parameters[index].size);
    if (module->text && own != sizes)
        return call.misuse(CUDA_ERROR_NOT_FOUND, "the PTX of " + wanted + " takes other parameters than its .cu");
    auto function = std::make_shared<Function>();
    function->context = context;
    function->module = key(given);
    function->name = wanted;
    function->kernel = twin->second;
    const uint64_t id = new_id();
    state.functions[id] = function;
    *out = handle<CUfunction>(id);
    return call.end(CUDA_SUCCESS);
}

#define FUNCTION(given) \
    ENTER; \
    const auto function = find_object(call, state.functions, context, given, "function", refused); \
    if (!function) return refused

EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction given) {
    Call call("cuFuncGetAttribute");
    FUNCTION(given);
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
             : attribute == CU_FUNC_ATTRIBUTE_PTX_VERSION || attribute == CU_FUNC_ATTRIBUTE_BINARY_VERSION
                 ? state.major * 10 + state.minor
                 : 0;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuFuncSetAttribute(CUfunction given, CUfunction_attribute, int) {
    Call call("cuFuncSetAttribute");
    FUNCTION(given);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction given, CUfunc_cache) {
    Call call("cuFuncSetCacheConfig");
    FUNCTION(given);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuFuncSetSharedMemConfig(CUfunction given, CUsharedconfig) {
    Call call("cuFuncSetSharedMemConfig");
    FUNCTION(given);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuFuncSetBlockShape(CUfunction given, int x, int y, int z) {
    Call call("cuFuncSetBlockShape");
    FUNCTION(given);
    if (x <= 0 || y <= 0 || z <= 0 || int64_t(x) * y * z > 1024)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, format("%s: a block of %d × %d × %d threads",
                                                            function->name.c_str(), x, y, z));
    function->block[0] = unsigned(x);
    function->block[1] = unsigned(y);
    function->block[2] = unsigned(z);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuFuncSetSharedSize(CUfunction given, unsigned bytes) {
    Call call("cuFuncSetSharedSize");
    FUNCTION(given);
    function->shared = bytes;
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuParamSetSize(CUfunction given, unsigned bytes) {
    Call call("cuParamSetSize");
    FUNCTION(given);
    function->parameters.resize(bytes);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuParamSetv(CUfunction given, int offset, void* value, unsigned bytes) {
    Call call("cuParamSetv");
    FUNCTION(given);
    if (offset < 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "a negative offset");
    if (function->parameters.size() < size_t(offset) + bytes) function->parameters.resize(size_t(offset) + bytes);
    memcpy(function->parameters.data() + offset, value, bytes);
    return call.end(CUDA_SUCCESS);
}
EXPORT CUresult cuParamSeti(CUfunction given, int offset, unsigned value) {
    return cuParamSetv(given, offset, &value, sizeof value);
}
EXPORT CUresult cuParamSetf(CUfunction given, int offset, float value) {
    return cuParamSetv(given, offset, &value, sizeof value);
}
EXPORT CUresult cuLaunch(CUfunction given) {
    Call call("cuLaunch");
    return launch_stored(call, given, 1, 1, nullptr);
}
EXPORT CUresult cuLaunchGrid(CUfunction given, int width, int height) {
    Call call("cuLaunchGrid");
    return launch_stored(call, given, width, height, nullptr);
}
EXPORT CUresult cuLaunchGridAsync(CUfunction given, int width, int height, CUstream stream) {
    Call call("cuLaunchGridAsync", stream);
    return launch_stored(call, given, width, height, stream);
}
EXPORT CUresult cuLaunchKernel(CUfunction given, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared, CUstream given_stream,
                               void** parameters, void** extra) {
    Call call("cuLaunchKernel", given_stream);
    FUNCTION(given);
    STREAM(given_stream);
    const unsigned char* packed = nullptr;
    size_t bytes = 0;
    for (void** option = extra; option && *option != CU_LAUNCH_PARAM_END; option += 2) {
        if (*option == CU_LAUNCH_PARAM_BUFFER_POINTER) packed = static_cast<const unsigned char*>(option[1]);
        else if (*option == CU_LAUNCH_PARAM_BUFFER_SIZE) bytes = *static_cast<const size_t*>(option[1]);
        else return call.misuse(CUDA_ERROR_INVALID_VALUE, "an unknown launch parameter");
    }
    if (function->kernel.count && !parameters == !packed)
        return call.misuse(CUDA_ERROR_INVALID_VALUE, "parameters must come in one of the two ways");
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    return launch(call, *function, grid, block, shared, stream, parameters, packed, bytes);
}

EXPORT CUresult cuProfilerStart() { return CUDA_SUCCESS; }
EXPORT CUresult cuProfilerStop() { return CUDA_SUCCESS; }

// What pycuda links to and nothing here needs. An asm label gives each its C name, whatever its parameters.
#define UNSUPPORTED(function) \
    extern "C" __attribute__((visibility("default"))) CUresult gpusim_no_##function() asm(#function); \
    CUresult gpusim_no_##function() { \
        Call call(#function); \
        return call.misuse(CUDA_ERROR_NOT_SUPPORTED, "not simulated"); \
    }
UNSUPPORTED(cuArray3DCreate_v2)
UNSUPPORTED(cuArray3DGetDescriptor_v2)
UNSUPPORTED(cuArrayCreate_v2)
UNSUPPORTED(cuArrayDestroy)
UNSUPPORTED(cuArrayGetDescriptor_v2)
UNSUPPORTED(cuCtxDisablePeerAccess)
UNSUPPORTED(cuCtxEnablePeerAccess)
UNSUPPORTED(cuDeviceCanAccessPeer)
UNSUPPORTED(cuIpcCloseMemHandle)
UNSUPPORTED(cuIpcGetEventHandle)
UNSUPPORTED(cuIpcGetMemHandle)
UNSUPPORTED(cuIpcOpenEventHandle)
UNSUPPORTED(cuIpcOpenMemHandle_v2)
UNSUPPORTED(cuLinkAddData_v2)
UNSUPPORTED(cuLinkAddFile_v2)
UNSUPPORTED(cuLinkComplete)
UNSUPPORTED(cuLinkCreate_v2)
UNSUPPORTED(cuLinkDestroy)
UNSUPPORTED(cuMemAllocManaged)
UNSUPPORTED(cuMemcpy2DAsync_v2)
UNSUPPORTED(cuMemcpy2DUnaligned_v2)
UNSUPPORTED(cuMemcpy2D_v2)
UNSUPPORTED(cuMemcpy3DAsync_v2)
UNSUPPORTED(cuMemcpy3DPeer)
UNSUPPORTED(cuMemcpy3DPeerAsync)
UNSUPPORTED(cuMemcpy3D_v2)
UNSUPPORTED(cuMemcpyAtoA_v2)
UNSUPPORTED(cuMemcpyAtoD_v2)
UNSUPPORTED(cuMemcpyAtoH_v2)
UNSUPPORTED(cuMemcpyDtoA_v2)
UNSUPPORTED(cuMemcpyHtoA_v2)
UNSUPPORTED(cuMemcpyPeer)
UNSUPPORTED(cuMemcpyPeerAsync)
UNSUPPORTED(cuModuleGetGlobal_v2)
UNSUPPORTED(cuModuleGetSurfRef)
UNSUPPORTED(cuModuleGetTexRef)
UNSUPPORTED(cuParamSetTexRef)
UNSUPPORTED(cuProfilerInitialize)
UNSUPPORTED(cuStreamAttachMemAsync)
UNSUPPORTED(cuSurfRefGetArray)
UNSUPPORTED(cuSurfRefSetArray)
UNSUPPORTED(cuTexRefCreate)
UNSUPPORTED(cuTexRefDestroy)
UNSUPPORTED(cuTexRefGetAddressMode)
UNSUPPORTED(cuTexRefGetAddress_v2)
UNSUPPORTED(cuTexRefGetArray)
UNSUPPORTED(cuTexRefGetFilterMode)
UNSUPPORTED(cuTexRefGetFlags)
UNSUPPORTED(cuTexRefGetFormat)
UNSUPPORTED(cuTexRefSetAddress2D_v3)
UNSUPPORTED(cuTexRefSetAddressMode)
UNSUPPORTED(cuTexRefSetAddress_v2)
UNSUPPORTED(cuTexRefSetArray)
UNSUPPORTED(cuTexRefSetFilterMode)
UNSUPPORTED(cuTexRefSetFlags)
UNSUPPORTED(cuTexRefSetFormat)

// ----------------------------------------------------------------------------------- for the tests, and TensorRT's

EXPORT void gpusim_log(int on) {
    Lock lock(state.mutex);
    state.logging = on;
}
// The text of one of the lists below, one entry a line, fields separated by tabs; to be given back to gpusim_release.
EXPORT char* gpusim_text(int what) {
    Lock lock(state.mutex);
    std::ostringstream text;
    if (what == 0)
        for (const Entry& one : state.log)
            text << one.name << '\t' << one.thread << '\t' << one.stream << '\t' << one.pointer << '\t' << one.bytes
                 << '\t' << one.result << '\t' << one.detail << '\n';
    else if (what == 1)
        for (const std::string& one : state.misuse) text << one << '\n';
    else {
        size_t pinned_bytes = 0, pending = 0;
        for (const auto& [address, memory] : state.host) pinned_bytes += memory.bytes;
        for (const auto& [id, stream] : state.streams) pending += stream->queue.size();
        for (const auto& [id, context] : state.contexts) pending += context->null_stream->queue.size();
        text << "allocations\t" << state.device.size() << "\nbytes\t" << state.used << "\npinned\t"
             << state.host.size() << "\npinned_bytes\t" << pinned_bytes << "\ncontexts\t" << state.contexts.size()
             << "\nstreams\t" << state.streams.size() << "\nevents\t" << state.events.size() << "\ngraphs\t"
             << state.graphs.size() << "\ngraph_execs\t" << state.executables.size() << "\nmodules\t"
             << state.modules.size() << "\npending\t" << pending << "\nabandoned\t" << state.abandoned << '\n';
    }
    return strdup(text.str().c_str());
}
EXPORT void gpusim_release(char* text) { free(text); }
EXPORT void gpusim_clear() {
    Lock lock(state.mutex);
    state.log.clear();
    ++state.epoch;
    state.misuse.clear();
    state.abandoned = 0;
}
EXPORT void gpusim_misuse(const char* what) {
    Lock lock(state.mutex);
    state.misuse.push_back(what);
}
EXPORT void gpusim_configure(int devices, size_t total, int major, int minor, int version) {
    Lock lock(state.mutex);
    state.devices = devices;
    state.total = total;
    state.major = major;
    state.minor = minor;
    state.version = version;
}
// Runs everything that is queued.
EXPORT void gpusim_drain() {
    Lock lock(state.mutex);
    std::vector<ContextPtr> contexts;
    for (const auto& [id, context] : state.contexts) contexts.push_back(context);
    for (const ContextPtr& context : contexts) synchronize(lock, context);
}
// Kernels of a library made by build.py. Null: loaded; else why not.
EXPORT const char* gpusim_load_kernels(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return dlerror();
    const auto list = reinterpret_cast<const gpusim::Kernel* (*)(size_t*)>(dlsym(library, "gpusim_kernels"));
    if (!list) return "no gpusim_kernels in it";
    size_t count;
    const gpusim::Kernel* kernels = list(&count);
    Lock lock(state.mutex);
    for (size_t index = 0; index < count; ++index) state.kernels[kernels[index].name] = kernels[index];
    return nullptr;
}
// 0 where the device may use [address, address + bytes) in a context, 1 where it is too small, 2 otherwise.
EXPORT int gpusim_check(uint64_t address, size_t bytes, uint64_t context_id) {
    Lock lock(state.mutex);
    const auto found = state.contexts.find(context_id);
    if (found == state.contexts.end()) return 2;
    const ContextPtr context = found->second;
    if (!wrong_device_range(address, 1, context).empty()) return 2;
    return wrong_device_range(address, bytes, context).empty() ? 0 : 1;
}

namespace {
std::mutex& released_mutex = *new std::mutex;  // its own, as a task may end with or without the lock held
std::vector<uint64_t>& released = *new std::vector<uint64_t>;

struct Task {  // says when nothing can run it any more: not a queue, not a graph
    uint64_t id;
    ~Task() {
        Lock lock(released_mutex);
        released.push_back(id);
    }
};
}  // namespace

// cuLaunchHostFunc for the simulated TensorRT, which has to know how long its function may still be called:
// gpusim_released() tells. Gives the number of the operation in the stream, 0 where the stream captures.
EXPORT CUresult gpusim_launch_task(CUstream given, int (*function)(uint64_t), uint64_t id, uint64_t* number) {
    auto task = std::make_shared<Task>();
    task->id = id;
    Call call("gpusim_launch_task", given);
    ENTER;
    STREAM(given);
    const auto queued = operation("TensorRT", [=] {
        inside_host_function = true;
        const int failed = function(task->id);
        inside_host_function = false;
        return failed ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
    });
    const CUresult result = enqueue(call, stream, queued);
    *number = queued->number;
    return result;
}
EXPORT size_t gpusim_released(uint64_t* ids, size_t room) {
    Lock lock(released_mutex);
    const size_t count = std::min(room, released.size());
    std::copy_n(released.end() - long(count), count, ids);
    released.resize(released.size() - count);
    return count;
}

namespace {
StreamPtr any_stream(uint64_t id) {
    if (!id && !current.empty()) {
        const auto context = state.contexts.find(current.back());
        return context == state.contexts.end() ? nullptr : context->second->null_stream;
    }
    const auto found = state.streams.find(id);
    return found == state.streams.end() ? nullptr : found->second;
}
bool follows(const StreamPtr& stream, const StreamPtr& other, uint64_t number) {
    if (stream == other) return true;
    if (stream == stream->context->null_stream && other->blocking) return true;
    if (other == other->context->null_stream && stream->blocking) return true;
    std::vector<std::pair<StreamPtr, uint64_t>> open{{stream, stream->submitted}};
    std::set<std::pair<Stream*, uint64_t>> seen;
    while (!open.empty()) {
        const auto [at, until] = open.back();
        open.pop_back();
        if (!seen.insert({at.get(), until}).second) continue;
        if (at == other && until >= number) return true;
        std::vector<OperationPtr> operations(at->queue.begin(), at->queue.end());
        if (at->running) operations.push_back(at->running);
        for (const OperationPtr& one : operations)
            if (one->number <= until) open.insert(open.end(), one->after.begin(), one->after.end());
    }
    return false;
}
}  // namespace

// Whether operation `number` of `stream` has ended.
EXPORT int gpusim_ended(uint64_t stream, uint64_t number) {
    Lock lock(state.mutex);
    const StreamPtr found = any_stream(stream);
    return !found || found->completed >= number;
}
// Whether work queued on `next` from now on is sure to start after that operation has ended.
EXPORT int gpusim_ordered(uint64_t stream, uint64_t number, uint64_t next) {
    Lock lock(state.mutex);
    const StreamPtr before = any_stream(stream), after = any_stream(next);
    return !before || !after || before->completed >= number || follows(after, before, number);
}
// 2: an invalid capture; 1: the stream captures; 0: it does not; -1: no such stream in the current context.
EXPORT int gpusim_stream(uint64_t id) {
    Lock lock(state.mutex);
    const StreamPtr stream = any_stream(id);
    if (!stream || current.empty() || stream->context->id != current.back()) return -1;
    return !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
}
EXPORT uint64_t gpusim_current() {
    Lock lock(state.mutex);
    return current.empty() || !state.contexts.count(current.back()) ? 0 : current.back();
}
