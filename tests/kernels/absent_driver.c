/* CUDA's driver without a device: every call succeeds, kernels do not run, launches are written down. */

#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_FUNCTIONS = 1024, MOST_PARAMETERS = 128, HEAD = 10 };

static size_t sizes[MOST_FUNCTIONS][MOST_PARAMETERS];
static size_t counts[MOST_FUNCTIONS];
static uintptr_t functions;
static unsigned char *written;
static size_t used, capacity, launches;
static int writes_down = 1;

/* Of a function: the bytes of its parameters. */
void absent_parameters(uintptr_t function, size_t count, const size_t *bytes) {
  counts[function] = count;
  memcpy(sizes[function], bytes, count * sizeof *bytes);
}

/* What was written since the last call: HEAD numbers of every launch, then its parameters. */
size_t absent_written(const unsigned char **start) {
  size_t length = used;
  *start = written;
  used = 0;
  return length;
}

void absent_write_down(int on) { writes_down = on; }

size_t absent_launches(void) { return launches; }

static void append(const void *what, size_t bytes) {
  if (used + bytes > capacity) {
    capacity = 2 * (used + bytes);
    written = realloc(written, capacity);
  }
  memcpy(written + used, what, bytes);
  used += bytes;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  uintptr_t function = (uintptr_t)f;
  uint64_t head[HEAD] = {c->gridDimX,  c->gridDimY,       c->gridDimZ,           c->blockDimX, c->blockDimY,
                         c->blockDimZ, c->sharedMemBytes, (uintptr_t)c->hStream, function,     c->numAttrs};
  launches++;
  if (writes_down) {
    append(head, sizeof head);
    for (size_t i = 0; i < counts[function]; i++) append(parameters[i], sizes[function][i]);
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction f, size_t i, size_t *offset, size_t *size) {
  uintptr_t function = (uintptr_t)f;
  if (i >= counts[function]) return CUDA_ERROR_INVALID_VALUE;
  *offset = 0;
  *size = sizes[function][i];
  return CUDA_SUCCESS;
}

/* A map that tells what it was made of. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint64_t made[16] = {type, rank, (uintptr_t)address, interleave, swizzle, promotion, fill};
  for (cuuint32_t i = 0; i < rank && i < 2; i++) {
    made[7 + i] = shape[i];
    made[9 + i] = i + 1 < rank ? strides[i] : 0;
    made[11 + i] = box[i];
    made[13 + i] = steps[i];
  }
  memcpy(map, made, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  *f = (CUfunction)++functions;
  return functions < MOST_FUNCTIONS ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute a, CUfunction f) {
  *value = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute a, CUdevice d) {
  *value = 227 * 1024; /* bytes of shared memory, and enough of anything else */
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute a, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice d) { return cuCtxGetCurrent(context); }

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "there is no device";
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 12080, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **v, CUdeviceptr p) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { return *n = 1, CUDA_SUCCESS; }
