// A CUDA runtime whose device is the host's own memory, for onnxruntime's real CUDA provider.
//
// Copies copy, kernels do nothing. Every call that a GPU would feel is written as one line to the
// file that FAKE_CUDA_LOG names:
//
//   copy TO FROM BYTES [waits]    TO and FROM: device, pinned or host
//   kernel NAME                   with " captured" behind it while a graph is recorded
//   wait                          for a stream or for all
//   allocate KIND BYTES           KIND: device or pinned
//   capture, captured, launch     a graph is recorded, is finished, is launched
//   fault WHAT                    what a real device would refuse
//
// Functions that the provider wants and that are not here are made by fake_cuda.py: they give 0.
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver_types.h"
#include "vector_types.h"

typedef cudaError_t Status;

// ---- the record -------------------------------------------------------------------------------

static FILE *record_file;
static int is_capturing;
static void *captured_stream;

static void record(const char *format, ...) {
  if (!record_file) {
    const char *path = getenv("FAKE_CUDA_LOG");
    if (!path || !*path || !(record_file = fopen(path, "a"))) return;
  }
  va_list values;
  va_start(values, format);
  vfprintf(record_file, format, values);
  va_end(values);
  fprintf(record_file, "%s\n", is_capturing ? " captured" : "");
  fflush(record_file);
}

static void refuse_in_capture(const char *what) {
  if (is_capturing) record("fault %s while a graph is recorded", what);
}

// ---- memory -----------------------------------------------------------------------------------

enum { MOST_BLOCKS = 1 << 16 };
typedef struct {
  char *begin;
  size_t size;
  const char *kind;
} Block;
static Block blocks[MOST_BLOCKS];
static int block_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const char *kind_of(const void *address) {
  const char *found = "host";
  pthread_mutex_lock(&lock);
  for (int i = 0; i < block_count; i++) {
    Block *block = &blocks[i];
    if (block->begin && (char *)address >= block->begin &&
        (char *)address < block->begin + block->size)
      found = block->kind;
  }
  pthread_mutex_unlock(&lock);
  return found;
}

static Status allocate(void **address, size_t size, const char *kind) {
  *address = NULL;
  if (!size) return cudaSuccess;
  refuse_in_capture("allocation");
  if (posix_memalign(address, 512, size)) return cudaErrorMemoryAllocation;
  memset(*address, 0, size);
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < block_count && blocks[i].begin) i++;
  if (i == MOST_BLOCKS) abort();
  if (i == block_count) block_count++;
  blocks[i] = (Block){*address, size, kind};
  pthread_mutex_unlock(&lock);
  record("allocate %s %zu", kind, size);
  return cudaSuccess;
}

static Status release(void *address) {
  pthread_mutex_lock(&lock);
  for (int i = 0; address && i < block_count; i++)
    if (blocks[i].begin == address) {
      blocks[i].begin = NULL;
      free(address);
      address = NULL;
    }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

Status cudaMalloc(void **a, size_t n) { return allocate(a, n, "device"); }
Status cudaMallocFromPoolAsync(void **a, size_t n, void *pool, void *s) {
  return allocate(a, n, "device");
}
Status cudaMallocHost(void **a, size_t n) { return allocate(a, n, "pinned"); }
Status cudaHostAlloc(void **a, size_t n, unsigned flags) { return allocate(a, n, "pinned"); }
Status cudaFree(void *a) { return release(a); }
Status cudaFreeAsync(void *a, void *s) { return release(a); }
Status cudaFreeHost(void *a) { return release(a); }
Status cudaMemGetInfo(size_t *unused, size_t *all) {
  *all = (size_t)32 << 30;
  *unused = (size_t)30 << 30;
  return cudaSuccess;
}
Status cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
  const char *kind = kind_of(address);
  memset(found, 0, sizeof *found);
  found->type = *kind == 'd'   ? cudaMemoryTypeDevice
                : *kind == 'p' ? cudaMemoryTypeHost
                               : cudaMemoryTypeUnregistered;
  found->devicePointer = found->hostPointer = (void *)address;
  return cudaSuccess;
}

static void copy(void *to, const void *from, size_t size, const char *how) {
  const char *left = kind_of(to), *right = kind_of(from);
  if (*how) refuse_in_capture("a copy that waits");
  if (is_capturing && (*left == 'h' || *right == 'h'))
    record("fault a copy of memory that is not page-locked while a graph is recorded");
  record("copy %s %s %zu%s", left, right, size, how);
  memmove(to, from, size);
}
Status cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  copy(to, from, size, " waits");
  return cudaSuccess;
}
Status cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  copy(to, from, size, "");
  return cudaSuccess;
}
Status cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t pitch, size_t width,
                         size_t rows, int kind, void *stream) {
  record("copy %s %s %zu", kind_of(to), kind_of(from), width * rows);
  for (size_t k = 0; k < rows; k++)
    memmove((char *)to + k * to_pitch, (const char *)from + k * pitch, width);
  return cudaSuccess;
}
Status cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, int kind) {
  memset(to, 0, size);
  return cudaSuccess;
}
Status cudaMemset(void *a, int value, size_t size) {
  refuse_in_capture("a memset that waits");
  memset(a, value, size);
  return cudaSuccess;
}
Status cudaMemsetAsync(void *a, int value, size_t size, void *stream) {
  record("kernel memset");
  memset(a, value, size);
  return cudaSuccess;
}

// ---- the device -------------------------------------------------------------------------------

static int capability(void) {
  const char *text = getenv("FAKE_CUDA_CAPABILITY");
  return text && *text ? atoi(text) : 89;
}
Status cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
Status cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
Status cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
Status cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
Status cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "host memory");
  found->major = capability() / 10;
  found->minor = capability() % 10;
  found->totalGlobalMem = (size_t)32 << 30;
  found->multiProcessorCount = 128;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = INT32_MAX;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsPerMultiProcessor = 1536;
  found->maxBlocksPerMultiProcessor = 24;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->sharedMemPerBlock = 48 << 10;
  found->sharedMemPerBlockOptin = 99 << 10;
  found->sharedMemPerMultiprocessor = 100 << 10;
  found->totalConstMem = 64 << 10;
  found->l2CacheSize = 64 << 20;
  found->memPitch = INT32_MAX;
  found->concurrentKernels = found->unifiedAddressing = found->memoryPoolsSupported = 1;
  return cudaSuccess;
}
Status cudaDeviceGetAttribute(int *value, int attribute, int device) {
  struct cudaDeviceProp all;
  cudaGetDeviceProperties(&all, device);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = all.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)all.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)all.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = (int)all.sharedMemPerMultiprocessor;
      break;
    case cudaDevAttrWarpSize: *value = all.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = all.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = all.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = all.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = all.minor; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
const char *cudaGetErrorString(Status status) { return "an error of the fake"; }
const char *cudaGetErrorName(Status status) { return "fakeError"; }

// ---- streams, events, graphs: handles are numbers that nobody looks into -----------------------

static uintptr_t next_handle = 0x1000;
static Status give(void **handle) { return *handle = (void *)next_handle++, cudaSuccess; }

Status cudaStreamCreate(void **s) { return give(s); }
Status cudaStreamCreateWithFlags(void **s, unsigned flags) { return give(s); }
Status cudaStreamSynchronize(void *s) {
  refuse_in_capture("a wait");
  record("wait");
  return cudaSuccess;
}
Status cudaDeviceSynchronize(void) { return cudaStreamSynchronize(NULL); }
Status cudaEventCreate(void **e) { return give(e); }
Status cudaEventCreateWithFlags(void **e, unsigned flags) { return give(e); }
Status cudaEventSynchronize(void *e) { return cudaStreamSynchronize(NULL); }
Status cudaEventElapsedTime(float *milliseconds, void *from, void *to) {
  return *milliseconds = 1, cudaSuccess;
}
Status cudaMemPoolCreate(void **pool, const void *properties) { return give(pool); }
Status cudaMemPoolGetAttribute(void *pool, int attribute, void *value) {
  memset(value, 0, 8);
  return cudaSuccess;
}
Status cudaStreamIsCapturing(void *stream, int *answer) {
  *answer = is_capturing && stream == captured_stream;
  return cudaSuccess;
}
Status cudaStreamBeginCapture(void *stream, int mode) {
  record("capture");
  is_capturing = 1;
  captured_stream = stream;
  return cudaSuccess;
}
Status cudaStreamEndCapture(void *stream, void **graph) {
  is_capturing = 0;
  record("captured");
  return give(graph);
}
Status cudaGraphInstantiate(void **ready, void *graph, unsigned long long flags) {
  return give(ready);
}
Status cudaGraphLaunch(void *ready, void *stream) {
  record("launch");
  return cudaSuccess;
}

// ---- kernels: found by name, never run ---------------------------------------------------------

typedef struct {
  const void *host;
  char *name;
} Kernel;
static Kernel *kernels;
static int kernel_count, kernel_room;

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name,
                            int limit, void *a, void *b, void *c, void *d, int *e) {
  if (kernel_count == kernel_room) {
    kernel_room = kernel_room ? 2 * kernel_room : 1024;
    kernels = realloc(kernels, kernel_room * sizeof *kernels);
  }
  kernels[kernel_count++] = (Kernel){host, strdup(name)};
}
static Status run(const void *kernel) {
  const char *name = "unknown";
  for (int i = 0; i < kernel_count; i++)
    if (kernels[i].host == kernel) name = kernels[i].name;
  record("kernel %s", name);
  return cudaSuccess;
}
static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pushed.grid = grid;
  pushed.block = block;
  pushed.shared = shared;
  pushed.stream = stream;
  return 0;
}
Status __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *(void **)stream = pushed.stream;
  return cudaSuccess;
}
Status __cudaGetKernel(void **kernel, const void *host) {
  return *kernel = (void *)host, cudaSuccess;
}
Status __cudaLaunchKernel(void *k, dim3 grid, dim3 block, void **a, size_t s, void *stream) {
  return run(k);
}
Status cudaLaunchKernel(const void *k, dim3 grid, dim3 block, void **a, size_t s, void *stream) {
  return run(k);
}
Status cudaLaunchCooperativeKernel(const void *k, dim3 grid, dim3 block, void **a, size_t s,
                                   void *stream) {
  return run(k);
}
Status cudaLaunchKernelExC(const void *settings, const void *k, void **a) { return run(k); }
Status cudaLaunchHostFunc(void *stream, void (*function)(void *), void *value) {
  function(value);
  return cudaSuccess;
}
Status cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->maxDynamicSharedSizeBytes = 99 << 10;
  return cudaSuccess;
}
Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel,
                                                              int block, size_t shared,
                                                              unsigned flags) {
  return *count = 2, cudaSuccess;
}
Status cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d,
                           void *e, unsigned f) {
  return give(library);
}
Status cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  return give(kernel);
}
Status cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                        unsigned long long flags, int *result) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  *function = driver ? dlsym(driver, name) : NULL;
  if (result) *result = *function ? 0 : 1;
  return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}
