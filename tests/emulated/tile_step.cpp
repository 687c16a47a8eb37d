// The kernels of tile_step.cu for tests, over the emulated warp.
#include <tile_step.cu>

using Body = void (*)(const void*);

#define ENTRY(name) \
  { #name, [](const void* step) { name(*(const Step*)step); } }

static const struct {
  const char* name;
  Body body;
} KERNELS[] = {ENTRY(list_gaussians), ENTRY(fit_tiles), ENTRY(move_gaussians)};

extern "C" int size_of_step() { return sizeof(Step); }

// Null, or what went wrong.
extern "C" const char* launch(const char* name, const void* step, int count, const int* blocks, int threads,
                              const int* lanes) {
  for (auto& kernel : KERNELS)
    if (!std::strcmp(kernel.name, name))
      return emulated::launch(kernel.body, step, count, blocks, threads, lanes) ? nullptr : emulated::ERROR;
  return "no such kernel";
}

// One function of a warp: words [32, 6] in, [32, 4] out; for the tests of the emulator itself.
static const u32 (*IN)[6];
static u32 (*OUT)[4];
static int FUNCTION;

static void one_function(const void*) {
  int lane = thread();
  const u32* in = IN[lane];
  u32* out = OUT[lane];
  if (FUNCTION == 0) {
    float d[4] = {};
    multiply_add(d, {in[0], in[1], in[2], in[3]}, in[4], in[5]);
    for (int i = 0; i < 4; i++) out[i] = bits_of(d[i]);
  } else if (FUNCTION == 1) {
    u32 d[2];
    multiply(d, in[0], in[1], in[2]);
    out[0] = d[0], out[1] = d[1];
  } else if (FUNCTION == 2) {
    out[0] = transposed(in[0]);
  } else if (FUNCTION == 3) {
    out[0] = halves(real(in[0]), real(in[1])), out[1] = times(in[2], in[3]), out[2] = at_least(in[2], in[3]);
  } else if (lane) {
    lanes_with(true);
  } else {
    sync_warp();
  }
}

extern "C" const char* one(int function, const u32 (*in)[6], u32 (*out)[4], const int* lanes) {
  FUNCTION = function, IN = in, OUT = out;
  int first = 0;
  return emulated::launch(one_function, nullptr, 1, &first, 32, lanes) ? nullptr : emulated::ERROR;
}

// A driver that has one device, whose kernels are those above: what `cuda.load` calls of libcuda.
static int DEPTH, STREAMS[8], LAUNCHES;
static const void* CONTEXT = &DEPTH;

extern "C" {
int driver_launches() { return LAUNCHES; }
int driver_depth() { return DEPTH; }
int driver_stream(int launch) { return STREAMS[launch]; }

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = 40 + ordinal, ordinal == 3 ? 0 : 101; }
int cuDevicePrimaryCtxRetain(const void** context, int device) {
  return *context = CONTEXT, device == 43 ? 0 : 101;
}
int cuCtxPushCurrent_v2(const void* context) { return DEPTH++, context == CONTEXT ? 0 : 201; }
int cuCtxPopCurrent_v2(const void** context) { return DEPTH--, *context = CONTEXT, 0; }
int cuModuleLoadData(const void** module, const char* image) {
  *module = KERNELS;
  return DEPTH == 0 ? 201 : std::memcmp(image, "machine code", 12) ? 200 : 0;
}
int cuModuleGetFunction(const void** function, const void* module, const char* name) {
  for (auto& kernel : KERNELS)
    if (module == KERNELS && !std::strcmp(kernel.name, name)) return *function = &kernel, 0;
  return 500;
}
int cuLaunchKernel(const void* function, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned ty,
                   unsigned tz, unsigned bytes, void* stream, void** arguments, void** extra) {
  if (DEPTH == 0 || y != 1 || z != 1 || ty != 1 || tz != 1 || bytes || extra) return 1;
  STREAMS[LAUNCHES++ % 8] = (int)(intptr_t)stream;
  std::vector<int> order(blocks), lanes(32);
  for (unsigned k = 0; k < blocks; k++) order[k] = k;
  for (int k = 0; k < 32; k++) lanes[k] = k;
  Body body = ((decltype(&KERNELS[0]))function)->body;
  return emulated::launch(body, arguments[0], blocks, order.data(), threads, lanes.data()) ? 0 : 700;
}
int cuGetErrorString(int error, const char** text) {
  return *text = error == 200 ? "device kernel image is invalid" : "another error", 0;
}
}
