/* A CUDA driver library of host memory: as much as singerembed calls, for tests of the Python packages that load it.
   Work is done when it is enqueued; calls that must balance are counted, and printed when the library is unloaded. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int contexts, current, buffers, pinned, streams, events;
static const size_t room = 1 << 20;
static char primary;

int cuInit(unsigned flags) { return getenv("FAKE_NO_DEVICE") ? 100 : 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int length, int device) { snprintf(name, length, "Fake"); return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) { *value = which == 75 ? 8 : which == 76 ? 9 : 16; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { contexts++; *context = &primary; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { contexts--; return 0; }
int cuCtxPushCurrent_v2(void* context) { current++; return context == &primary ? 0 : 201; }
int cuCtxPopCurrent_v2(void** context) { current--; *context = &primary; return current < 0 ? 201 : 0; }
int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) { *free_bytes = room; *total = 2 * room; return current ? 0 : 201; }
int cuMemAlloc_v2(uintptr_t* address, size_t size) {
  if (!current) return 201;
  if (size > room) return 2;
  buffers++;
  *address = (uintptr_t)malloc(size);
  return 0;
}
int cuMemFree_v2(uintptr_t address) { buffers--; free((void*)address); return current ? 0 : 201; }
int cuMemHostAlloc(void** address, size_t size, unsigned flags) {
  if (!current) return 201;
  if (size > room) return 2;
  pinned++;
  *address = malloc(size);
  return 0;
}
int cuMemFreeHost(void* address) { pinned--; free(address); return current ? 0 : 201; }
int cuStreamCreate(void** stream, unsigned flags) {
  if (!current || flags != 1) return 1;
  streams++;
  *stream = malloc(1);
  return 0;
}
int cuStreamDestroy_v2(void* stream) { streams--; free(stream); return 0; }
int cuStreamSynchronize(void* stream) { return stream ? 0 : 1; }
int cuStreamWaitEvent(void* stream, void* event, unsigned flags) { return stream && event ? 0 : 1; }
int cuEventCreate(void** event, unsigned flags) {
  if (flags != 2) return 1;
  events++;
  *event = calloc(1, sizeof(int));
  return 0;
}
int cuEventRecord(void* event, void* stream) { return stream ? 0 : 1; }
int cuEventQuery(void* event) { return (*(int*)event)++ ? 0 : 600; } /* not ready at first */
int cuEventDestroy_v2(void* event) { events--; free(event); return 0; }
int cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t size, void* stream) {
  memcpy((void*)to, from, size);
  return stream ? 0 : 1;
}
int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t size, void* stream) {
  memcpy(to, (void*)from, size);
  return stream ? 0 : 1;
}

int cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* status) {
  char versioned[128];
  snprintf(versioned, sizeof versioned, "%s_v2", symbol);
  *function = dlsym(RTLD_DEFAULT, versioned);
  if (!*function) {
    Dl_info here;
    void* self = dladdr((void*)cuInit, &here) ? dlopen(here.dli_fname, RTLD_LAZY) : 0;
    *function = self ? dlsym(self, versioned) : 0;
    if (self && !*function) *function = dlsym(self, symbol);
  }
  if (status) *status = *function ? 0 : 1;
  return 0;
}
int cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, 0);
}

__attribute__((destructor)) static void report(void) {
  fprintf(stderr, "left: contexts %d current %d buffers %d pinned %d streams %d events %d\n", contexts, current, buffers,
          pinned, streams, events);
}
