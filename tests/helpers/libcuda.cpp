// A strict stand-in for NVIDIA's driver (libcuda.so.1), for machines without a GPU.
//
// It has the functions of the driver API that the engine calls, and enforces what their documentation says. Work that
// is queued runs only when its stream is synchronised. Device memory is host memory between guard pages, at addresses
// that are never used twice; it starts filled with noise. Functions whose names begin with `fake` are for tests.
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

typedef int CUresult;
enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, ILLEGAL_STATE = 401, NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700, NOT_PERMITTED = 800, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903, CAPTURE_WRONG_THREAD = 908,
};
static const std::map<int, const char*> NAMES = {
    {0, "CUDA_SUCCESS"}, {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"}, {100, "CUDA_ERROR_NO_DEVICE"}, {101, "CUDA_ERROR_INVALID_DEVICE"},
    {200, "CUDA_ERROR_INVALID_IMAGE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
    {400, "CUDA_ERROR_INVALID_HANDLE"}, {401, "CUDA_ERROR_ILLEGAL_STATE"}, {500, "CUDA_ERROR_NOT_FOUND"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"}, {702, "CUDA_ERROR_LAUNCH_TIMEOUT"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"}, {800, "CUDA_ERROR_NOT_PERMITTED"}, {801, "CUDA_ERROR_NOT_SUPPORTED"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}, {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"}, {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"}, {999, "CUDA_ERROR_UNKNOWN"},
};

typedef std::function<int()> Work;
struct Block { char* base; size_t size, mapped; bool pinned; char* device; };  // `device`: where the GPU sees it
struct Stream { std::deque<Work> queue; bool capturing = false, invalid = false; int mode = 0; std::thread::id thread; std::vector<Work> captured; };
struct Graph { std::vector<Work> work; };
struct Kernel { std::string name; void (*run)(void**, int, int, int); std::vector<size_t> sizes; std::string pointers; };

static std::recursive_mutex guard;
static const std::map<std::string, long> USUAL_SETTINGS = {
    {"driver", 12060}, {"devices", 1}, {"major", 8}, {"minor", 7}, {"integrated", 0}, {"memory", 8L << 30}, {"init", 0}};
static std::map<std::string, long> settings = USUAL_SETTINGS;
static std::map<uintptr_t, Block> blocks;  // by the address that the GPU uses
static std::map<uintptr_t, uintptr_t> host_of;  // a pinned block's host address -> its device address
static std::set<Stream*> streams;
static std::set<Graph*> graphs, executables;
static std::map<std::string, Kernel> known_kernels;
static std::set<std::set<std::string>*> modules;
static long retained = 0, used = 0, calls = 0, fail_in = -1, failing = 0, broken = 0, capturing_streams = 0;
static std::string failed_in;
static std::map<std::string, long> counts;  // of calls, by function
static bool initialised = false;
static int the_context;  // its address is the handle of the primary context
static thread_local std::vector<void*> current;

#define API extern "C" __attribute__((visibility("default"))) CUresult
#define LOCK std::lock_guard<std::recursive_mutex> lock(guard)

// Whether the call fails because a test wants it to.
static int injected(const char* name) {
    ++calls;
    ++counts[name];
    if (fail_in < 0 || fail_in-- > 0) return SUCCESS;
    failed_in = name;
    return (int)failing;
}
static int entered(const char* name) {
    if (!initialised) return NOT_INITIALIZED;
    if (current.empty() || retained == 0) return INVALID_CONTEXT;
    if (int status = injected(name)) return status;
    return (int)broken;
}
#define ENTER LOCK; if (int status = entered(__func__)) return status
// Calls that free something do so even where they report an error of earlier work, as the documentation says.
#define ENTER_FREE LOCK; int status = entered(__func__); if (status == NOT_INITIALIZED || status == INVALID_CONTEXT) return status
#define REFUSE(condition, code) do { if (condition) return (code); } while (0)

// What no thread may do while it captures (modes global and thread-local).
static int unsafe() {
    for (Stream* s : streams)
        if (s->capturing && s->mode != 2 && (s->mode == 0 || s->thread == std::this_thread::get_id())) {
            s->invalid = true;
            return CAPTURE_UNSUPPORTED;
        }
    return SUCCESS;
}
static const Block* block_at(uintptr_t address, size_t size) {
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin()) return nullptr;
    const Block& block = std::prev(after)->second;
    return address + size <= (uintptr_t)block.device + block.size ? &block : nullptr;
}
static bool is_pinned(const void* host, size_t size) {
    auto after = host_of.upper_bound((uintptr_t)host);
    if (after == host_of.begin()) return false;
    const Block& block = blocks.at(std::prev(after)->second);
    return (char*)host + size <= block.base + block.size;
}
static sigjmp_buf back;
static void on_fault(int) { siglongjmp(back, 1); }
static int guarded(const Work& work) {  // a kernel that touches freed memory must not end the tests
    struct sigaction ours = {}, before_segv, before_bus;
    ours.sa_handler = on_fault;
    ours.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &ours, &before_segv);
    sigaction(SIGBUS, &ours, &before_bus);
    int status = ILLEGAL_ADDRESS;
    if (sigsetjmp(back, 1) == 0) status = work();
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    return status;
}
static int run_all(Stream* s) {
    while (!s->queue.empty()) {
        Work work = s->queue.front();
        s->queue.pop_front();
        if (int status = work()) broken = status;  // it stays, as on a GPU
        if (broken) s->queue.clear();
    }
    return (int)broken;
}
static int copied(const std::string& direction, size_t size) {
    ++counts["copies " + direction];
    counts["bytes " + direction] += (long)size;
    return SUCCESS;
}
static int queue(Stream* s, Work work) {
    if (!streams.count(s)) return INVALID_HANDLE;
    if (!s->capturing) { s->queue.push_back(work); return SUCCESS; }
    if (s->invalid) return CAPTURE_INVALIDATED;
    s->captured.push_back(work);
    return SUCCESS;
}

API cuInit(unsigned flags) {
    LOCK;
    if (int status = injected(__func__)) return status;
    REFUSE(settings["init"], (int)settings["init"]);
    REFUSE(settings["devices"] == 0, NO_DEVICE);
    initialised = true;
    return flags ? INVALID_VALUE : SUCCESS;
}
API cuDriverGetVersion(int* version) { *version = (int)settings["driver"]; return SUCCESS; }
API cuGetErrorName(CUresult error, const char** name) {
    auto found = NAMES.find(error);
    *name = found == NAMES.end() ? nullptr : found->second;
    return *name ? SUCCESS : INVALID_VALUE;
}
API cuGetErrorString(CUresult error, const char** text) {
    if (int status = cuGetErrorName(error, text)) { *text = "unrecognized error code"; return status; }
    return SUCCESS;
}
// NVIDIA's own libraries ask for tables that are not documented.
API cuGetExportTable(const void** table, const void* which) { *table = nullptr; return NOT_FOUND; }
API cuDeviceGetCount(int* count) {
    LOCK;
    REFUSE(!initialised, NOT_INITIALIZED);
    if (int status = injected(__func__)) return status;
    *count = (int)settings["devices"];
    return SUCCESS;
}
API cuDeviceGet(int* device, int ordinal) {
    LOCK;
    REFUSE(!initialised, NOT_INITIALIZED);
    if (int status = injected(__func__)) return status;
    *device = ordinal;
    return ordinal >= 0 && ordinal < settings["devices"] ? SUCCESS : INVALID_DEVICE;
}
API cuDeviceGetName(char* name, int length, int device) { snprintf(name, (size_t)length, "Stand-in"); return initialised ? SUCCESS : NOT_INITIALIZED; }
API cuDeviceGetAttribute(int* value, int attribute, int device) {
    LOCK;
    REFUSE(!initialised, NOT_INITIALIZED);
    if (int status = injected(__func__)) return status;
    *value = attribute == 75 ? (int)settings["major"] : attribute == 76 ? (int)settings["minor"] : attribute == 18 ? (int)settings["integrated"] : 1;
    return SUCCESS;
}
API cuDevicePrimaryCtxRetain(void** context, int device) {
    LOCK;
    REFUSE(!initialised, NOT_INITIALIZED);
    if (int status = injected(__func__)) return status;
    if (int status = unsafe()) return status;
    ++retained;
    *context = &the_context;
    return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int device) {
    LOCK;
    REFUSE(!initialised, NOT_INITIALIZED);
    REFUSE(retained == 0, INVALID_CONTEXT);
    int status = injected(__func__);
    if (--retained == 0) broken = 0;  // a new primary context is a healthy one
    return status;
}
API cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }
API cuCtxPushCurrent_v2(void* context) {
    LOCK;
    REFUSE(!initialised, NOT_INITIALIZED);
    REFUSE(context != &the_context || retained == 0, INVALID_CONTEXT);
    if (int status = injected(__func__)) return status;
    current.push_back(context);
    return SUCCESS;
}
API cuCtxPopCurrent_v2(void** context) {
    LOCK;
    REFUSE(current.empty(), INVALID_CONTEXT);  // the one error that is documented, so no other is injected
    if (context) *context = current.back();
    current.pop_back();
    return SUCCESS;
}
API cuCtxGetCurrent(void** context) { *context = current.empty() ? nullptr : current.back(); return SUCCESS; }
API cuCtxSetCurrent(void* context) {
    LOCK;
    if (!current.empty()) current.pop_back();
    if (context) current.push_back(context);
    return SUCCESS;
}
API cuCtxGetDevice(int* device) { ENTER; *device = 0; return SUCCESS; }
API cuCtxGetApiVersion(void* context, unsigned* version) { *version = 3020; return SUCCESS; }
API cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER;
    *total = (size_t)settings["memory"];
    *free = *total - (size_t)used;
    return SUCCESS;
}

API cuStreamCreate(Stream** stream, unsigned flags) {
    ENTER;
    if (int status = unsafe()) return status;
    streams.insert(*stream = new Stream);
    return SUCCESS;
}
API cuStreamSynchronize(Stream* stream) {
    ENTER;
    REFUSE(!streams.count(stream), INVALID_HANDLE);
    if (stream->capturing) { stream->invalid = true; return CAPTURE_UNSUPPORTED; }
    return run_all(stream);
}
API cuStreamDestroy_v2(Stream* stream) {
    ENTER_FREE;
    REFUSE(!streams.count(stream), INVALID_HANDLE);
    if (!broken) run_all(stream);
    streams.erase(stream);
    delete stream;
    return status;
}
API cuStreamIsCapturing(Stream* stream, int* state) {
    ENTER;
    REFUSE(!streams.count(stream), INVALID_HANDLE);
    *state = !stream->capturing ? 0 : stream->invalid ? 2 : 1;
    return SUCCESS;
}
API cuStreamGetCtx(Stream* stream, void** context) { ENTER; *context = &the_context; return SUCCESS; }
API cuCtxSynchronize() {
    ENTER;
    if (int status = unsafe()) return status;
    for (Stream* s : streams) if (int status = run_all(s)) return status;
    return SUCCESS;
}

static const size_t PAGE = 4096;
static size_t in_pages(size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }
// The end of a block is at most 255 bytes before a page that nobody may touch.
static size_t lead(size_t size) { return in_pages(size) - (size + 255) / 256 * 256; }
static char* reserve(size_t size) { return (char*)mmap(nullptr, in_pages(size) + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + PAGE; }

API cuMemAlloc_v2(uintptr_t* address, size_t size) {
    ENTER;
    if (int status = unsafe()) return status;
    REFUSE(size == 0, INVALID_VALUE);
    REFUSE(used + (long)size > settings["memory"], OUT_OF_MEMORY);
    char* base = reserve(size);
    mprotect(base, in_pages(size), PROT_READ | PROT_WRITE);
    memset(base, 0xA5, in_pages(size));
    char* start = base + lead(size);
    *address = (uintptr_t)start;
    blocks[*address] = Block{base, size, in_pages(size), false, start};
    used += (long)size;
    return SUCCESS;
}
API cuMemFree_v2(uintptr_t address) {
    ENTER_FREE;
    if (int code = unsafe()) return code;
    auto found = blocks.find(address);
    REFUSE(found == blocks.end() || found->second.pinned, INVALID_VALUE);
    madvise(found->second.base, found->second.mapped, MADV_DONTNEED);
    mprotect(found->second.base, found->second.mapped, PROT_NONE);  // and nobody gets this address again
    used -= (long)found->second.size;
    blocks.erase(found);
    return status;
}
API cuMemHostAlloc(void** host, size_t size, unsigned flags) {
    ENTER;
    if (int status = unsafe()) return status;
    REFUSE(size == 0 || !(flags & 2), INVALID_VALUE);  // without the flag the GPU does not see it
    REFUSE(used + (long)size > settings["memory"], OUT_OF_MEMORY);
    // The same pages at two addresses, so that whoever gives the GPU a host's address is found out.
    int file = memfd_create("pinned", 0);
    REFUSE(file < 0 || ftruncate(file, (off_t)in_pages(size)) != 0, OUT_OF_MEMORY);
    char *seen_by_host = reserve(size), *seen_by_gpu = reserve(size);
    mmap(seen_by_host, in_pages(size), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
    mmap(seen_by_gpu, in_pages(size), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
    close(file);
    memset(seen_by_host, 0xA5, in_pages(size));
    *host = seen_by_host + lead(size);
    char* device = seen_by_gpu + lead(size);
    blocks[(uintptr_t)device] = Block{(char*)*host, size, in_pages(size), true, device};
    host_of[(uintptr_t)*host] = (uintptr_t)device;
    used += (long)size;
    return SUCCESS;
}
API cuMemFreeHost(void* host) {
    ENTER_FREE;
    if (int code = unsafe()) return code;
    auto found = host_of.find((uintptr_t)host);
    REFUSE(found == host_of.end(), INVALID_VALUE);
    Block block = blocks.at(found->second);
    for (char* start : {(char*)host, block.device})
        mmap(start - lead(block.size), block.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    used -= (long)block.size;
    blocks.erase(found->second);
    host_of.erase(found);
    return status;
}
API cuMemHostGetDevicePointer_v2(uintptr_t* device, void* host, unsigned flags) {
    ENTER;
    auto found = host_of.find((uintptr_t)host);
    REFUSE(found == host_of.end(), INVALID_VALUE);
    *device = found->second;
    return SUCCESS;
}

API cuMemsetD8Async(uintptr_t address, unsigned char value, size_t size, Stream* stream) {
    ENTER;
    return queue(stream, [=] {
        if (!block_at(address, size)) return (int)ILLEGAL_ADDRESS;
        memset((void*)address, value, size);
        return (int)SUCCESS;
    });
}
// Memory that is not pinned is copied to a staging buffer at once, and may not be copied while capturing.
API cuMemcpyHtoDAsync_v2(uintptr_t address, const void* host, size_t size, Stream* stream) {
    ENTER;
    REFUSE(!streams.count(stream), INVALID_HANDLE);
    REFUSE(!block_at(address, size), INVALID_VALUE);
    if (is_pinned(host, size))
        return queue(stream, [=] {
            if (!block_at(address, size) || !is_pinned(host, size)) return (int)ILLEGAL_ADDRESS;
            memcpy((void*)address, host, size);
            return copied("to device", size);
        });
    if (stream->capturing) { stream->invalid = true; return CAPTURE_UNSUPPORTED; }
    std::vector<char> staged((const char*)host, (const char*)host + size);
    return queue(stream, [=] {
        if (!block_at(address, size)) return (int)ILLEGAL_ADDRESS;
        memcpy((void*)address, staged.data(), size);
        return copied("to device", size);
    });
}
API cuMemcpyDtoHAsync_v2(void* host, uintptr_t address, size_t size, Stream* stream) {
    ENTER;
    REFUSE(!streams.count(stream), INVALID_HANDLE);
    REFUSE(!block_at(address, size), INVALID_VALUE);
    Work work = [=] {
        if (!block_at(address, size)) return (int)ILLEGAL_ADDRESS;
        memcpy(host, (void*)address, size);
        return copied("to host", size);
    };
    if (is_pinned(host, size)) return queue(stream, [=] { return is_pinned(host, size) ? work() : (int)ILLEGAL_ADDRESS; });
    if (stream->capturing) { stream->invalid = true; return CAPTURE_UNSUPPORTED; }
    queue(stream, work);
    return run_all(stream);  // returns once the copy is done
}
struct Copy2D {  // CUDA_MEMCPY2D
    size_t source_x, source_y; unsigned source_type; const void* source_host; uintptr_t source_device; void* source_array; size_t source_pitch;
    size_t target_x, target_y; unsigned target_type; void* target_host; uintptr_t target_device; void* target_array; size_t target_pitch;
    size_t width, height;
};
API cuMemcpy2DAsync_v2(const Copy2D* given, Stream* stream) {
    ENTER;
    Copy2D c = *given;
    REFUSE(c.source_type != 2 || c.target_type != 2, NOT_SUPPORTED);  // this stand-in copies within the GPU
    REFUSE(c.height && ((c.source_pitch && c.width > c.source_pitch) || (c.target_pitch && c.width > c.target_pitch)), INVALID_VALUE);
    return queue(stream, [=] {
        for (size_t row = 0; row < c.height; ++row) {
            uintptr_t source = c.source_device + (c.source_y + row) * c.source_pitch + c.source_x;
            uintptr_t target = c.target_device + (c.target_y + row) * c.target_pitch + c.target_x;
            if (!block_at(source, c.width) || !block_at(target, c.width)) return (int)ILLEGAL_ADDRESS;
            memmove((void*)target, (void*)source, c.width);
        }
        return (int)SUCCESS;
    });
}

API cuModuleLoadData(void** module, const void* image) {
    ENTER;
    if (int status = unsafe()) return status;
    REFUSE(memcmp(image, "\x7f" "ELF", 4) != 0, INVALID_IMAGE);
    auto* loaded = new std::set<std::string>;
    modules.insert(loaded);
    *module = loaded;
    return SUCCESS;
}
API cuModuleLoadDataEx(void** module, const void* image, unsigned options, int* names, void** values) {
    return cuModuleLoadData(module, image);
}
API cuModuleUnload(void* module) {
    ENTER_FREE;
    auto* loaded = (std::set<std::string>*)module;
    REFUSE(!modules.count(loaded), INVALID_HANDLE);
    modules.erase(loaded);
    delete loaded;
    return status;
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
    ENTER;
    REFUSE(!modules.count((std::set<std::string>*)module), INVALID_HANDLE);
    auto found = known_kernels.find(name);
    REFUSE(found == known_kernels.end(), NOT_FOUND);
    *function = &found->second;
    return SUCCESS;
}
// PyCUDA sets the shape of a block twice: by this old function, and when it launches.
API cuFuncSetBlockShape(void* function, int x, int y, int z) { ENTER; return SUCCESS; }
API cuFuncGetAttribute(int* value, int attribute, void* function) { ENTER; *value = 0; return SUCCESS; }
API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Stream* stream, void** parameters, void** extra) {
    ENTER;
    Kernel* kernel = (Kernel*)function;
    REFUSE(!gx || !gy || !gz || !bx || bx * by * bz > 1024, INVALID_VALUE);
    REFUSE(!parameters == !extra, INVALID_VALUE);
    std::vector<std::vector<char>> values;
    if (parameters) {
        for (size_t i = 0; i < kernel->sizes.size(); ++i)
            values.emplace_back((char*)parameters[i], (char*)parameters[i] + kernel->sizes[i]);
    } else {  // one buffer in which each value is aligned to its size: {1, buffer, 2, its size, 0}
        const char* buffer = (const char*)extra[1];
        size_t size = *(size_t*)extra[3], at = 0;
        REFUSE((uintptr_t)extra[0] != 1 || (uintptr_t)extra[2] != 2, INVALID_VALUE);
        for (size_t each : kernel->sizes) {
            at = (at + each - 1) / each * each;
            REFUSE(at + each > size, INVALID_VALUE);
            values.emplace_back(buffer + at, buffer + at + each);
            at += each;
        }
    }
    return queue(stream, [=]() mutable {
        std::vector<void*> given;
        for (size_t i = 0; i < values.size(); ++i) {
            given.push_back(values[i].data());
            if (kernel->pointers[i] == 'p' && !block_at(*(uintptr_t*)values[i].data(), 1)) return (int)ILLEGAL_ADDRESS;
        }
        ++counts["run " + kernel->name];
        return guarded([&] { kernel->run(given.data(), (int)gx, (int)gy, (int)bx); return (int)SUCCESS; });
    });
}

API cuStreamBeginCapture_v2(Stream* stream, int mode) {
    ENTER;
    REFUSE(!streams.count(stream), INVALID_HANDLE);
    REFUSE(stream->capturing, ILLEGAL_STATE);
    stream->capturing = true;
    stream->invalid = false;
    stream->mode = mode;
    stream->thread = std::this_thread::get_id();
    stream->captured.clear();
    return SUCCESS;
}
API cuStreamEndCapture(Stream* stream, Graph** graph) {
    LOCK;
    int status = entered(__func__);
    REFUSE(status == INVALID_CONTEXT || !streams.count(stream), status ? status : INVALID_HANDLE);
    *graph = nullptr;
    REFUSE(!stream->capturing, CAPTURE_UNMATCHED);
    REFUSE(stream->mode != 2 && stream->thread != std::this_thread::get_id(), CAPTURE_WRONG_THREAD);
    stream->capturing = false;
    REFUSE(status, status);
    REFUSE(stream->invalid, CAPTURE_INVALIDATED);
    graphs.insert(*graph = new Graph{stream->captured});
    return SUCCESS;
}
API cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long flags) {
    ENTER;
    REFUSE(!graphs.count(graph), INVALID_HANDLE);
    executables.insert(*executable = new Graph{graph->work});
    return SUCCESS;
}
API cuGraphLaunch(Graph* executable, Stream* stream) {
    ENTER;
    REFUSE(!executables.count(executable), INVALID_HANDLE);
    for (Work& work : executable->work) if (int status = queue(stream, work)) return status;
    return SUCCESS;
}
API cuGraphDestroy(Graph* graph) {
    ENTER_FREE;
    REFUSE(!graphs.erase(graph), INVALID_HANDLE);
    delete graph;
    return status;
}
API cuGraphExecDestroy(Graph* executable) {
    ENTER_FREE;
    REFUSE(!executables.erase(executable), INVALID_HANDLE);
    delete executable;
    return status;
}

// A function by name, in the form that the caller's version of CUDA means.
API cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* found) {
    std::string name = symbol;
    if (name == "cuGraphInstantiate") name = "cuGraphInstantiateWithFlags";
    *function = nullptr;
    for (const char* suffix : {"_v2", ""})
        if (!*function) *function = dlsym(RTLD_DEFAULT, (name + suffix).c_str());
    if (found) *found = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
API cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}

// For tests.
API fakeSet(const char* name, long value) { LOCK; settings[name] = value; return SUCCESS; }
API fakeFail(long after, int status) { LOCK; fail_in = after; failing = status; failed_in.clear(); return SUCCESS; }
extern "C" __attribute__((visibility("default"))) const char* fakeFailedIn() { return failed_in.c_str(); }
extern "C" __attribute__((visibility("default"))) long fakeCalls() { return calls; }
extern "C" __attribute__((visibility("default"))) long fakeCount(const char* name) { LOCK; return counts[name]; }
// What is still held: memory blocks, streams, graphs, executable graphs, modules, retained contexts, this thread's stack.
extern "C" __attribute__((visibility("default"))) void fakeHeld(long* counts) {
    LOCK;
    const long held[] = {(long)blocks.size(), (long)streams.size(), (long)graphs.size(), (long)executables.size(), (long)modules.size(), retained, (long)current.size()};
    memcpy(counts, held, sizeof held);
}
// As at the start, whatever a broken engine left behind. What is held is not freed: an object that still has its address
// must not free one of the next test. PyCUDA keeps its context until the process ends.
API fakeReset(long kept_contexts) {
    LOCK;
    blocks.clear(); host_of.clear(); streams.clear(); graphs.clear(); executables.clear(); modules.clear();
    settings = USUAL_SETTINGS;
    used = calls = failing = broken = 0;
    fail_in = -1;
    if (retained > kept_contexts) retained = kept_contexts;
    counts.clear();
    current.clear();
    return SUCCESS;
}
// A kernel that runs as host code. `kinds` has a letter for each parameter: p a pointer, i 32 bits.
API fakeKernel(const char* name, void (*run)(void**, int, int, int), const char* kinds) {
    LOCK;
    Kernel kernel{name, run, {}, kinds};
    for (const char* kind = kinds; *kind; ++kind) kernel.sizes.push_back(*kind == 'p' ? 8 : 4);
    known_kernels[name] = kernel;
    return SUCCESS;
}
// Queue a function of the host, as TensorRT queues its kernels: it runs when the stream gets there.
API fakeQueue(Stream* stream, int (*run)(long), long number) {
    ENTER;
    return queue(stream, [=] { return run(number); });
}
API fakeIsDevice(uintptr_t address, size_t size) { LOCK; return block_at(address, size) != nullptr; }
