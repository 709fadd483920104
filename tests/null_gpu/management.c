// NVML, as far as vLLM and torch ask it about the GPU that does nothing.
#include <stdio.h>
#include <stdlib.h>
static int setting(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}
typedef struct { unsigned long long total, free, used; } Memory;
int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return "error of the null GPU"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = setting("NULL_GPU_COUNT", 1); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetHandleByUUID(const char *id, void **handle) { *handle = (void *)1; return 0; }
int nvmlDeviceGetIndex(void *handle, unsigned *index) { *index = (long)handle - 1; return 0; }
int nvmlDeviceGetName(void *handle, char *name, unsigned size) { snprintf(name, size, "NVIDIA H100 80GB HBM3"); return 0; }
int nvmlDeviceGetUUID(void *handle, char *id, unsigned size) {
    snprintf(id, size, "GPU-00000000-0000-0000-0000-%012ld", (long)handle);
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = setting("NULL_GPU_SM", 90) / 10;
    *minor = setting("NULL_GPU_SM", 90) % 10;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    memory->total = (unsigned long long)setting("NULL_GPU_GIB", 80) << 30;
    memory->used = 1ull << 30;
    memory->free = memory->total - memory->used;
    return 0;
}
int nvmlDeviceGetP2PStatus(void *from, void *to, int index, int *status) { *status = 0; return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned size) { snprintf(version, size, "580.65.06"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
