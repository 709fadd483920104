// A GPU that does nothing: CUDA's runtime and driver, cuBLAS and NCCL, whose memory is the host's and whose launches are counted.
// What a real driver refuses while a graph is recorded is refused here too. README.md says what follows from that.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// ---- What is counted; run.py has the names in this order.
enum { LAUNCHES, PRODUCTS, STREAM_WAITS, DEVICE_WAITS, EVENT_WAITS, TO_DEVICE, TO_HOST, PAGEABLE, GRAPH_LAUNCHES, RECORDED, COLLECTIVES,
       CPU_POINTERS, NUM_COUNTERS };
long null_counters[NUM_COUNTERS];

static int setting(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}
static int capability(void) { return setting("NULL_GPU_SM", 90); }
static size_t total_memory(void) { return (size_t)setting("NULL_GPU_GIB", 80) << 30; }

static __thread cudaError_t last_error;
static cudaError_t fail(cudaError_t error) { return last_error = error; }
#define OK return cudaSuccess

static long handles = 0x1000;
static void *new_handle(void) { return (void *)__sync_add_and_fetch(&handles, 16); }

// ---- Memory: ranges of the host's, told apart as the device's, pinned, or neither.
#define PAGE ((size_t)2 << 20)
enum { PAGED = -1, DEVICE = 0, PINNED = 1 };
typedef struct { char *start; size_t size; int kind; } Range;
static Range ranges[65536];
static int num_ranges;
static size_t used_memory;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *take(size_t size, int kind) {
    size = size ? (size + PAGE - 1) & ~(PAGE - 1) : PAGE;
    if (kind == DEVICE && used_memory + size > total_memory()) return NULL;
    char *start = mmap(NULL, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return NULL;
    start = (char *)(((size_t)start + PAGE - 1) & ~(PAGE - 1));
    pthread_mutex_lock(&lock);
    ranges[num_ranges++] = (Range){start, size, kind};
    if (kind == DEVICE) used_memory += size;
    pthread_mutex_unlock(&lock);
    return start;
}
static void give_back(void *start) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_ranges; i++) {
        if (ranges[i].start != start) continue;
        if (ranges[i].kind == DEVICE) used_memory -= ranges[i].size;
        munmap(start, ranges[i].size);
        ranges[i] = ranges[--num_ranges];
        break;
    }
    pthread_mutex_unlock(&lock);
}
static int kind_of(const void *pointer) {
    int kind = PAGED;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_ranges; i++)
        if ((char *)pointer >= ranges[i].start && (char *)pointer < ranges[i].start + ranges[i].size) kind = ranges[i].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

// ---- Recording a graph.
static cudaStream_t recording_stream;
static int is_recording, graph, executable;
static long recording_number;
static __thread int is_relaxed;
// A bit in the handle of a stream that the legacy stream does not wait for.
#define NON_BLOCKING 1

static int is_recorded(cudaStream_t stream) { return is_recording && stream == recording_stream; }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    is_recording = 1;
    recording_stream = stream;
    recording_number++;
    OK;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *result) {
    is_recording = 0;
    *result = (cudaGraph_t)&graph;
    OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = is_recorded(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *number,
                                     cudaGraph_t *result, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    cudaStreamIsCapturing(stream, status);
    if (number) *number = recording_number;
    if (result) *result = (cudaGraph_t)&graph;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    OK;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = is_relaxed ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal;
    is_relaxed = *mode == cudaStreamCaptureModeRelaxed;
    *mode = before;
    OK;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *result, cudaGraph_t source, unsigned long long flags) {
    *result = (cudaGraphExec_t)&executable;
    OK;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *result, cudaGraph_t source, unsigned long long flags) {
    return cudaGraphInstantiate(result, source, flags);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t source, cudaGraphNode_t *nodes, size_t *count) { *count = 1; OK; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t which, cudaStream_t stream) { null_counters[GRAPH_LAUNCHES]++; OK; }

// ---- Allocations and copies.
cudaError_t cudaMalloc(void **result, size_t size) {
    if (is_recording && !is_relaxed) return fail(cudaErrorStreamCaptureUnsupported);
    *result = take(size, DEVICE);
    return *result ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void *pointer) { if (pointer) give_back(pointer); OK; }
cudaError_t cudaMallocAsync(void **result, size_t size, cudaStream_t stream) { return cudaMalloc(result, size); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }
cudaError_t cudaHostAlloc(void **result, size_t size, unsigned flags) { *result = take(size, PINNED); OK; }
cudaError_t cudaMallocHost(void **result, size_t size) { *result = take(size, PINNED); OK; }
cudaError_t cudaFreeHost(void *pointer) { return cudaFree(pointer); }
cudaError_t cudaHostGetDevicePointer(void **result, void *pointer, unsigned flags) { *result = pointer; OK; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *total = total_memory(); *free = *total - used_memory; OK; }
cudaError_t cudaGetSymbolAddress(void **result, const void *symbol) { *result = take(4096, DEVICE); OK; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    int kind = kind_of(pointer);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->devicePointer = kind == PAGED ? NULL : (void *)pointer;
    attributes->hostPointer = kind == PINNED ? (void *)pointer : NULL;
    OK;
}
// Triton asks this of every pointer that a kernel is given.
CUresult cuPointerGetAttribute(void *result, CUpointer_attribute which, CUdeviceptr pointer) {
    if (kind_of((void *)pointer) == PAGED) {
        null_counters[CPU_POINTERS]++;
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)result = pointer;
    else if (which == CU_POINTER_ATTRIBUTE_CONTEXT) *(void **)result = (void *)0x10;
    else *(int *)result = which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? CU_MEMORYTYPE_DEVICE : 0;
    return 0;
}

static void copy(void *to, const void *from, size_t size) {
    int target = kind_of(to), source = kind_of(from);
    if (target == DEVICE && source != DEVICE) null_counters[TO_DEVICE]++;
    if (target != DEVICE && source == DEVICE) null_counters[TO_HOST]++;
    if (target == PAGED || source == PAGED) null_counters[PAGEABLE]++;
    // Between device and host all bytes arrive; large copies on the device would only take time.
    if (target != DEVICE || source != DEVICE || size < (1 << 20)) memmove(to, from, size);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { copy(to, from, size); OK; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (is_recorded(stream)) {
        null_counters[RECORDED]++;
        if (kind_of(to) == PAGED || kind_of(from) == PAGED) return fail(cudaErrorStreamCaptureUnsupported);
    }
    copy(to, from, size);
    OK;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size, cudaStream_t stream) {
    copy(to, from, size);
    OK;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t i = 0; i < height; i++) memmove((char *)to + i * to_pitch, (char *)from + i * from_pitch, width);
    copy(to, from, 0);
    OK;
}
cudaError_t cudaMemset(void *pointer, int value, size_t size) { if (size < (1 << 24)) memset(pointer, value, size); OK; }
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t size, cudaStream_t stream) {
    null_counters[LAUNCHES]++;
    null_counters[RECORDED] += is_recorded(stream);
    return cudaMemset(pointer, value, size);
}

// ---- Streams and events.
cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = new_handle(); OK; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    *stream = (cudaStream_t)((char *)new_handle() + (flags & cudaStreamNonBlocking ? NON_BLOCKING : 0));
    OK;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    null_counters[STREAM_WAITS]++;
    return is_recorded(stream) ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return is_recorded(stream) ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) {
    null_counters[DEVICE_WAITS]++;
    return is_recording ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = new_handle(); OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = new_handle(); OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { null_counters[EVENT_WAITS]++; OK; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) { *milliseconds = 1; OK; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) { function(data); OK; }
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags) {
    function(stream, 0, data);
    OK;
}

// ---- Launches.
static cudaError_t launch(cudaStream_t stream) {
    null_counters[LAUNCHES]++;
    null_counters[RECORDED] += is_recorded(stream);
    int waits_for_recording = is_recording && stream == NULL && !((long)recording_stream & NON_BLOCKING);
    return waits_for_recording ? fail(cudaErrorStreamCaptureImplicit) : cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) { return launch(config->stream); }
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    return launch((cudaStream_t)config->hStream);
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        CUstream stream, void **arguments, void **extra) {
    return launch((cudaStream_t)stream);
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed[64];
static __thread int num_pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed[num_pushed].grid = grid;
    pushed[num_pushed].block = block;
    pushed[num_pushed].shared = shared;
    pushed[num_pushed++].stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    num_pushed--;
    *grid = pushed[num_pushed].grid;
    *block = pushed[num_pushed].block;
    *shared = pushed[num_pushed].shared;
    *(void **)stream = pushed[num_pushed].stream;
    OK;
}

// ---- Kernels and modules: handles.
static long binary;
void **__cudaRegisterFatBinary(void *image) { return (void **)&binary; }
char __cudaInitModule(void **handle) { return 1; }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; OK; }
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *options, void **values, unsigned count,
                                enum cudaLibraryOption *more, void **more_values, unsigned more_count) {
    *library = new_handle();
    OK;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) { *kernel = new_handle(); OK; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = new_handle(); return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = new_handle(); return 0; }
CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *options, void **values, unsigned count,
                           CUlibraryOption *more, void **more_values, unsigned more_count) {
    *library = new_handle();
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->maxDynamicSharedSizeBytes = 49152;
    attributes->binaryVersion = attributes->ptxVersion = capability();
    OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int size, size_t shared) { *blocks = 2; OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared, unsigned f) {
    *blocks = 2;
    OK;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) { *clusters = 16; return 0; }

// ---- The device: an H100.
#define NAME "NVIDIA H100 80GB HBM3"
static __thread int device;
static int attribute(int which) {
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrTotalConstantMemory: case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize: case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 52428800;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return capability() >= 90 ? 233472 : 167936;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return capability() >= 90 ? 232448 : 166912;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrConcurrentKernels: case cudaDevAttrUnifiedAddressing: case cudaDevAttrManagedMemory: case cudaDevAttrCooperativeLaunch:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: case cudaDevAttrMemoryPoolsSupported:
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return 1;
    default: return 0;
    }
}
cudaError_t cudaGetDeviceCount(int *count) { *count = setting("NULL_GPU_COUNT", 1); OK; }
cudaError_t cudaGetDevice(int *which) { *which = device; OK; }
cudaError_t cudaSetDevice(int which) { device = which; OK; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int of) { *value = attribute(which); OK; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice of) { *value = attribute(which); return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int of) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, NAME);
    p->totalGlobalMem = total_memory();
    p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536;
    p->warpSize = p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = p->memPitch = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = capability() / 10;
    p->minor = capability() % 10;
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    p->maxThreadsPerMultiProcessor = 2048;
    p->memoryBusWidth = 5120;
    p->textureAlignment = 512;
    p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1;
    p->asyncEngineCount = 3;
    OK;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) { *can = 1; OK; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int of) { snprintf(id, size, "0000:%02x:00.0", of + 1); OK; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int of) { *pool = new_handle(); OK; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value) { *(long *)value = 0; OK; }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) { memset(handle, 0, sizeof *handle); OK; }
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *handle, cudaEvent_t event) { memset(handle, 0, sizeof *handle); OK; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; OK; }
cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = 0; return error; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing blocking stream";
    default: return "error of the null GPU";
    }
}
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// ---- The driver's interface.
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
CUresult cuDeviceGet(CUdevice *result, int index) { *result = index; return 0; }
CUresult cuDeviceGetName(char *name, int size, CUdevice of) { snprintf(name, size, NAME); return 0; }
CUresult cuDeviceTotalMem_v2(size_t *size, CUdevice of) { *size = total_memory(); return 0; }
CUresult cuMemGetInfo_v2(size_t *free, size_t *total) { return cudaMemGetInfo(free, total); }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)0x10; return 0; }
CUresult cuCtxGetDevice(CUdevice *result) { *result = device; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice of) { *context = (CUcontext)0x10; return 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice of, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = error ? "error of the null GPU" : "no error"; return 0; }
CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }
CUresult cuMemAlloc_v2(CUdeviceptr *result, size_t size) { return cudaMalloc((void **)result, size); }
CUresult cuMemFree_v2(CUdeviceptr pointer) { give_back((void *)pointer); return 0; }
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *properties, CUmemAllocationGranularity_flags flags) {
    *size = PAGE;
    return 0;
}
CUresult cuMemAddressReserve(CUdeviceptr *result, size_t size, size_t alignment, CUdeviceptr address, unsigned long long flags) {
    *result = (CUdeviceptr)take(size, DEVICE);
    return *result ? 0 : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size) { give_back((void *)pointer); return 0; }
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties, unsigned long long flags) {
    *handle = (unsigned long long)new_handle();
    return 0;
}
CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) { madvise((void *)pointer, size, MADV_DONTNEED); return 0; }

static int nothing(void) { return 0; }
static void *find(const char *name) {
    char versioned[256];
    void *function = dlsym(RTLD_DEFAULT, name);
    for (int version = 4; !function && version >= 2; version--) {
        snprintf(versioned, sizeof versioned, "%s_v%d", name, version);
        function = dlsym(RTLD_DEFAULT, versioned);
    }
    return function ? function : (void *)nothing;
}
CUresult cuGetProcAddress_v2(const char *name, void **result, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
    *result = find(name);
    if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **result, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    *result = find(name);
    if (status) *status = cudaDriverEntryPointSuccess;
    OK;
}

// ---- cuBLAS: matrix products are launches.
static int product(void) {
    null_counters[LAUNCHES]++;
    null_counters[PRODUCTS]++;
    null_counters[RECORDED] += is_recording;
    return 0;
}
int cublasLtMatmul(void) { return product(); }
int cublasGemmEx(void) { return product(); }
int cublasGemmStridedBatchedEx(void) { return product(); }
int cublasSgemm_v2(void) { return product(); }
int cublasSgemmEx(void) { return product(); }
int cublasSgemmStridedBatched(void) { return product(); }
int cublasDgemm_v2(void) { return product(); }
int cublasDgemmStridedBatched(void) { return product(); }
int cublasSgemv_v2(void) { return product(); }
int cublasHgemm(void) { return product(); }
int cublasCreate_v2(void **result) { *result = new_handle(); return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetVersion_v2(void *handle, int *version) { *version = 130101; return 0; }
long cublasLtGetVersion(void) { return 130101; }
int cublasLtCreate(void **result) { *result = new_handle(); return 0; }
int cublasLtMatmulDescCreate(void **result, int compute, int scale) { *result = new_handle(); return 0; }
int cublasLtMatmulPreferenceCreate(void **result) { *result = new_handle(); return 0; }
int cublasLtMatrixLayoutCreate(void **result, int type, unsigned long rows, unsigned long columns, long stride) {
    *result = new_handle();
    return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   char *results, int *found) {
    memset(results, 0, 104); // one cublasLtMatmulHeuristicResult_t
    *found = 1;
    return 0;
}

// ---- NCCL: a rank gets back what it sends.
typedef struct { char bytes[128]; } Id;
int ncclGetUniqueId(Id *id) { memset(id, 1, sizeof *id); return 0; }
int ncclGetVersion(int *version) { *version = 22907; return 0; }
const char *ncclGetErrorString(int error) { return "no error"; }
const char *ncclGetLastError(void *communicator) { return ""; }
int ncclCommInitRank(void **result, int size, Id id, int rank) { *result = new_handle(); return 0; }
int ncclCommInitRankConfig(void **result, int size, Id id, int rank, void *config) { *result = new_handle(); return 0; }
int ncclCommInitRankScalable(void **result, int size, int rank, int ids, void *id, void *config) { *result = new_handle(); return 0; }
int ncclCommSplit(void *communicator, int color, int key, void **result, void *config) { *result = new_handle(); return 0; }
int ncclCommGetAsyncError(void *communicator, int *error) { *error = 0; return 0; }
int ncclCommCount(void *communicator, int *count) { *count = 1; return 0; }
int ncclCommUserRank(void *communicator, int *rank) { *rank = 0; return 0; }
int ncclMemAlloc(void **result, size_t size) { *result = take(size, DEVICE); return 0; }
int ncclRedOpCreatePreMulSum(int *operation, void *scalar, int type, int residence, void *communicator) { *operation = 5; return 0; }

static int collective(const void *from, void *to, size_t count, int type) {
    static const int widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    size_t size = count * (type < 12 ? widths[type] : 1);
    null_counters[COLLECTIVES]++;
    if (from != to && size < (1 << 24)) memmove(to, from, size);
    return 0;
}
int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, void *communicator, void *stream) {
    return collective(from, to, count, type);
}
int ncclReduce(const void *from, void *to, size_t count, int type, int operation, int root, void *communicator, void *stream) {
    return collective(from, to, count, type);
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation, void *communicator, void *stream) {
    return collective(from, to, count, type);
}
int ncclAllGather(const void *from, void *to, size_t count, int type, void *communicator, void *stream) {
    return collective(from, to, count, type);
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *communicator, void *stream) {
    return collective(from, to, count, type);
}
int ncclBcast(void *buffer, size_t count, int type, int root, void *communicator, void *stream) {
    return collective(buffer, buffer, count, type);
}
int ncclSend(const void *from, size_t count, int type, int peer, void *communicator, void *stream) {
    return collective(from, (void *)from, count, type);
}
int ncclRecv(void *to, size_t count, int type, int peer, void *communicator, void *stream) { return collective(to, to, count, type); }
