// Writes a line per call of a stub function between record_start and record_stop: its name and, for an operator
// (aclnn...GetWorkspaceSize), the dtype, shape and strides of the tensors among its first arguments; for GELU its form.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TENSORS = 1 << 20, AXES = 8, ARGUMENTS = 6 };
typedef struct {
  int dtype, axes;
  int64_t shape[AXES], strides[AXES];
} Tensor;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Tensor* tensors;
static uint64_t used;
static FILE* file;

void record_start(const char* path) {
  pthread_mutex_lock(&mutex);
  file = fopen(path, "w");
  pthread_mutex_unlock(&mutex);
}

void record_stop(void) {
  pthread_mutex_lock(&mutex);
  if (file) fclose(file);
  file = NULL;
  pthread_mutex_unlock(&mutex);
}

void* record_tensor(const int64_t* shape, uint64_t axes, int dtype, const int64_t* strides) {
  pthread_mutex_lock(&mutex);
  if (!tensors) tensors = calloc(TENSORS, sizeof(Tensor));
  Tensor* t = &tensors[used++ % TENSORS];
  pthread_mutex_unlock(&mutex);
  t->dtype = dtype;
  t->axes = axes < AXES ? axes : AXES;
  for (int i = 0; i < t->axes; i++) {
    t->shape[i] = shape[i];
    t->strides[i] = strides ? strides[i] : 0;
  }
  return t;
}

static int is_tensor(long value) {
  uintptr_t offset = (uintptr_t)value - (uintptr_t)tensors;
  return tensors && offset < TENSORS * sizeof(Tensor) && offset % sizeof(Tensor) == 0;
}

static void list(const int64_t* values, int count) {
  for (int i = 0; i < count; i++) fprintf(file, "%s%ld", i ? "," : "", (long)values[i]);
}

long record_call(const char* name, long a, long b, long c, long d, long e, long f) {
  pthread_mutex_lock(&mutex);
  if (file) {
    long arguments[ARGUMENTS] = {a, b, c, d, e, f};
    fputs(name, file);
    if (!strcmp(name, "aclopExecuteV2") || !strncmp(name, "aclopCompile", 12)) fprintf(file, " %s", (const char*)a);
    if (!strcmp(name, "aclnnGeluV2GetWorkspaceSize")) fputs(b == 0 ? " none" : " tanh", file);
    if (!strcmp(name, "aclnnGeluBackwardV2GetWorkspaceSize")) fprintf(file, " %s", (const char*)c);
    for (int i = 0; strstr(name, "GetWorkspaceSize") && i < ARGUMENTS; i++) {
      if (!is_tensor(arguments[i])) continue;
      Tensor* t = (Tensor*)arguments[i];
      fprintf(file, " %d[", t->dtype);
      list(t->shape, t->axes);
      fputs("](", file);
      list(t->strides, t->axes);
      fputc(')', file);
    }
    fputc('\n', file);
  }
  pthread_mutex_unlock(&mutex);
  return 0;
}
