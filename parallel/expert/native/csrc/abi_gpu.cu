// The C interface on GPUs: kernels on num_sms SMs, all blocks resident together, four channels of three roles a block.
// NCCL is loaded by path at run time and its version checked; nothing links to it.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "abi.h"
#include "abi_sizes.h"
#include "combine.h"
#include "dispatch.h"
#include "machine_gpu.cuh"
#include "notify.h"

using namespace ep;

constexpr int ROLES = 3, CHANNELS_PER_BLOCK = 4, WARPS = ROLES * CHANNELS_PER_BLOCK, THREADS = 32 * WARPS;
constexpr int LEAST_NCCL = NCCL_VERSION(2, 30, 4);
constexpr int SHARED_BYTES = WARPS * BULK_BYTES;

// Shared memory, warp, role and channel of the calling thread.
struct Place {
  int warp, role, channel;
  char* bulk;
  __device__ explicit Place(char* shared)
      : warp(threadIdx.x / 32), role(warp % ROLES), channel(blockIdx.x * CHANNELS_PER_BLOCK + warp / ROLES),
        bulk(shared + warp * BULK_BYTES) {}
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
ep_layout_kernel(const __grid_constant__ ncclDevComm comm, const __grid_constant__ GpuRank g,
                 const __grid_constant__ Routing r, const __grid_constant__ NotifyArguments a) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[WARPS];
  const Place at(shared);
  GpuMachine d(comm, g, 0, at.bulk, barriers + at.warp);
  layout(d, g.shape, r, a, blockIdx.x * WARPS + at.warp, gridDim.x * WARPS);
}

extern "C" __global__ void __launch_bounds__(32 * ROLES, 1)
ep_exchange_kernel(const __grid_constant__ ncclDevComm comm, const __grid_constant__ GpuRank g,
                   const __grid_constant__ Routing r, const __grid_constant__ NotifyArguments a) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[WARPS];
  const Place at(shared);
  GpuMachine d(comm, g, 0, at.bulk, barriers + at.warp);
  if (at.role == 0) notify_send(d, g.shape, g.layout, r, a);
  else if (at.role == 1) notify_forward(d, g.shape, g.layout, r, a);
  else notify_receive(d, g.shape, g.layout, r, a);
}

extern "C" __global__ void __launch_bounds__(32, 1)
ep_tables_kernel(const __grid_constant__ ncclDevComm comm, const __grid_constant__ GpuRank g,
                 const __grid_constant__ Routing r) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[WARPS];
  GpuMachine d(comm, g, 0, shared, barriers);
  tables(d, g.shape, r);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
ep_dispatch_kernel(const __grid_constant__ ncclDevComm comm, const __grid_constant__ GpuRank g,
                   const __grid_constant__ Routing r, const __grid_constant__ DispatchArguments a) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[WARPS];
  const Place at(shared);
  if (at.channel >= g.shape.channels) return;
  GpuMachine d(comm, g, at.channel, at.bulk, barriers + at.warp);
  if (at.role == 0) dispatch_send(d, g.shape, g.layout, g.progress, r, a, at.channel);
  else if (at.role == 1) dispatch_forward(d, g.shape, g.layout, g.progress, r, a, at.channel);
  else dispatch_receive(d, g.shape, g.layout, g.progress, r, a, at.channel);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
ep_combine_kernel(const __grid_constant__ ncclDevComm comm, const __grid_constant__ GpuRank g,
                  const __grid_constant__ Routing r, const __grid_constant__ CombineArguments a) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[WARPS];
  const Place at(shared);
  if (at.channel >= g.shape.channels) return;
  GpuMachine d(comm, g, at.channel, at.bulk, barriers + at.warp);
  if (at.role == 0) combine_send(d, g.shape, g.layout, g.progress, r, a, at.channel);
  else if (at.role == 1) combine_forward(d, g.shape, g.layout, g.progress, r, a, at.channel);
  else combine_receive(d, g.shape, g.layout, g.progress, r, a, at.channel);
}

namespace {

// The functions of NCCL that set a window up.
struct Nccl {
  decltype(&ncclGetVersion) get_version;
  decltype(&ncclGetUniqueId) get_unique_id;
  decltype(&ncclCommInitRank) init_rank;
  decltype(&ncclCommDestroy) destroy;
  decltype(&ncclMemAlloc) alloc;
  decltype(&ncclMemFree) free;
  decltype(&ncclCommWindowRegister) register_window;
  decltype(&ncclCommWindowDeregister) deregister_window;
  decltype(&ncclDevCommCreate) create_device_comm;
  decltype(&ncclDevCommDestroy) destroy_device_comm;
};

char problem[256];

bool refuse(const char* text, const char* detail) {
  std::snprintf(problem, sizeof problem, "%s%s", text, detail);
  return false;
}
bool good(ncclResult_t status, const char* what) { return status == ncclSuccess || refuse("NCCL failed in ", what); }
bool good(cudaError_t status, const char* what) { return status == cudaSuccess || refuse(what, cudaGetErrorString(status)); }

bool load(const char* path, Nccl& nccl) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return refuse("NCCL cannot be loaded: ", dlerror());
  bool whole = true;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) whole = refuse("this NCCL is older than 2.30.4: it has no ", name);
  };
  find(nccl.get_version, "ncclGetVersion"), find(nccl.get_unique_id, "ncclGetUniqueId");
  find(nccl.init_rank, "ncclCommInitRank"), find(nccl.destroy, "ncclCommDestroy");
  find(nccl.alloc, "ncclMemAlloc"), find(nccl.free, "ncclMemFree");
  find(nccl.register_window, "ncclCommWindowRegister"), find(nccl.deregister_window, "ncclCommWindowDeregister");
  find(nccl.create_device_comm, "ncclDevCommCreate"), find(nccl.destroy_device_comm, "ncclDevCommDestroy");
  int version = 0;
  if (!whole || !good(nccl.get_version(&version), "ncclGetVersion")) return false;
  if (version >= LEAST_NCCL) return true;
  char number[32];
  std::snprintf(number, sizeof number, "%d", version);
  return refuse("NCCL 2.30.4 (23004) or newer is needed, this one is ", number);
}

}  // namespace

struct EpMachine {
  Nccl nccl{};
  GpuRank rank{};
  ncclComm_t comm{};
  ncclDevComm device_comm{};
  void* window = nullptr;
  uint64_t* words = nullptr;
  uint64_t epoch = 0;
  int num_sms = 0;
  cudaStream_t stream{};

  Routing routing(const EpTransfer& t) const {
    Routing r{};
    r.place(rank.shape, t.tokens, t.top_k, t.fixed);
    if (t.lists != nullptr) r.place_lists(t.lists, t.forwarded);
    return r;
  }

  template <class... Arguments>
  bool launch(const char* name, void (*kernel)(Arguments...), int blocks, int threads, int shared_bytes,
              std::common_type_t<Arguments>... arguments) {
    void* list[] = {&arguments...};
    return good(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name) &&
           good(cudaLaunchCooperativeKernel((const void*)kernel, dim3(blocks), dim3(threads), list, shared_bytes, stream), name);
  }

  bool open(const Shape& s, int me, const char* id, const EpOptions& o) {
    ncclUniqueId unique;
    std::memcpy(&unique, id, sizeof unique);
    rank.shape = s, rank.layout = Layout::make(s), rank.patience_ns = o.patience_ns, num_sms = (int)o.num_sms;
    if (s.channels > num_sms * CHANNELS_PER_BLOCK) return refuse("more channels than four for each of num_sms", "");
    const size_t bytes = rank.layout.window_bytes, rail = (size_t)s.channels * s.nodes, nvl = (size_t)s.channels * s.locals;
    const size_t word_bytes = 8 * (2 * rail + 2 * nvl + NUM_COUNTERS + 2);
    if (!good(nccl.init_rank(&comm, s.ranks(), unique, me), "ncclCommInitRank") ||
        !good(nccl.alloc(&window, bytes), "ncclMemAlloc") || !good(cudaMemset(window, 0, bytes), "cudaMemset: ") ||
        !good(cudaMalloc(&words, word_bytes), "cudaMalloc: ") || !good(cudaMemset(words, 0, word_bytes), "cudaMemset: ") ||
        !good(cudaDeviceSynchronize(), "cudaDeviceSynchronize: ") ||
        !good(nccl.register_window(comm, window, bytes, &rank.window, NCCL_WIN_COLL_SYMMETRIC), "ncclCommWindowRegister"))
      return false;
    rank.progress = {words, words + rail, words + 2 * rail, words + 2 * rail + nvl};
    rank.counters = (unsigned long long*)words + 2 * rail + 2 * nvl, rank.failed_values = rank.counters + NUM_COUNTERS;
    ncclDevCommRequirements_t needs = NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER;
    needs.ginConnectionType = NCCL_GIN_CONNECTION_RAIL, needs.ginForceEnable = s.nodes > 1;
    needs.ginType = s.nodes > 1 ? NCCL_GIN_TYPE_GDAKI : NCCL_GIN_TYPE_NONE;
    needs.ginContextCount = s.channels < 16 ? s.channels : 16;
    if (!good(nccl.create_device_comm(comm, &needs, &device_comm), "ncclDevCommCreate")) return false;
    rank.contexts = device_comm.ginContextCount > 0 ? device_comm.ginContextCount : 1;
    // The window is symmetric and zero on all ranks from here on: creating the device communicator is collective.
    return true;
  }
};

extern "C" {

// The last refusal of ep_load, ep_open or a launch.
const char* ep_problem() { return problem; }
// 1 and ep_problem() if the NCCL at this path is missing or too old. id: 128 bytes, written on the first rank.
int ep_unique_id(const char* nccl_path, char* id) {
  Nccl nccl{};
  ncclUniqueId unique;
  if (!load(nccl_path, nccl) || !good(nccl.get_unique_id(&unique), "ncclGetUniqueId")) return 1;
  std::memcpy(id, &unique, sizeof unique);
  return 0;
}
EpMachine* ep_open_gpu(const char* nccl_path, const Shape* s, int rank, const char* id, const EpOptions* o) {
  auto* m = new EpMachine;
  if (load(nccl_path, m->nccl) && m->open(*s, rank, id, *o)) return m;
  ep_close(m);
  return nullptr;
}
void ep_close(EpMachine* m) {
  if (m->device_comm.ginContextCount != 0 || m->rank.contexts != 0) m->nccl.destroy_device_comm(m->comm, &m->device_comm);
  if (m->rank.window != nullptr) m->nccl.deregister_window(m->comm, m->rank.window);
  if (m->window != nullptr) m->nccl.free(m->window);
  cudaFree(m->words);
  if (m->comm != nullptr) m->nccl.destroy(m->comm);
  delete m;
}
void ep_set_stream(EpMachine* m, void* stream) { m->stream = (cudaStream_t)stream; }
// Tells this rank's kernels; they tell the others when they see it.
void ep_stop(EpMachine* m) {
  const int me = m->device_comm.rank;
  const uint64_t word = Failure{STOPPED, LAYOUT, 0, me, me, 0}.pack();
  cudaMemcpy((char*)m->window + m->rank.layout.abort, &word, 8, cudaMemcpyHostToDevice);
}
void ep_failure(EpMachine* m, int64_t* out) {
  uint64_t word[2] = {}, values[2] = {};
  cudaMemcpy(word, (char*)m->window + m->rank.layout.abort, 8, cudaMemcpyDeviceToHost);
  cudaMemcpy(word + 1, (char*)m->window + m->rank.layout.rail_abort, 8, cudaMemcpyDeviceToHost);
  cudaMemcpy(values, m->rank.failed_values, 16, cudaMemcpyDeviceToHost);
  const Failure f = Failure::unpack(word[0] != 0 ? word[0] : word[1]);
  const int64_t all[8] = {f.code, f.role, f.channel, f.rank, f.peer, f.argument, (int64_t)values[0], (int64_t)values[1]};
  std::memcpy(out, all, sizeof all);
}
void ep_counters(EpMachine* m, uint64_t* out) { cudaMemcpy(out, m->rank.counters, 8 * NUM_COUNTERS, cudaMemcpyDeviceToHost); }

// These three start work on the stream; a failure shows in ep_failure once the stream is done.
int ep_notify(EpMachine* m, const EpTransfer* t, const int64_t* ids, int row_bytes, int format) {
  const Routing r = m->routing(*t);
  const NotifyArguments a{ids, {t->top_k, row_bytes, format, 0}, m->epoch++};
  return !(m->launch("layout: ", ep_layout_kernel, m->num_sms, THREADS, 0, m->device_comm, m->rank, r, a) &&
           m->launch("exchange: ", ep_exchange_kernel, 1, 32 * ROLES, 0, m->device_comm, m->rank, r, a) &&
           m->launch("tables: ", ep_tables_kernel, 1, 32, 0, m->device_comm, m->rank, r));
}
int ep_dispatch(EpMachine* m, const EpTransfer* t, const void* x, const void* weights, void* rows, void* row_weights,
                int row_bytes, int format) {
  const DispatchArguments a{static_cast<const char*>(x), static_cast<const uint32_t*>(weights),
                            static_cast<char*>(rows), static_cast<uint32_t*>(row_weights), row_bytes, format};
  return !m->launch("dispatch: ", ep_dispatch_kernel, m->num_sms, THREADS, SHARED_BYTES, m->device_comm, m->rank,
                    m->routing(*t), a);
}
int ep_combine(EpMachine* m, const EpTransfer* t, const void* rows, const void* row_weights, void* sum, void* weights,
               int dim, int format, int wire) {
  const CombineArguments a{static_cast<const char*>(rows), static_cast<const uint32_t*>(row_weights),
                           static_cast<char*>(sum), static_cast<uint32_t*>(weights), dim, format, wire};
  return !m->launch("combine: ", ep_combine_kernel, m->num_sms, THREADS, SHARED_BYTES, m->device_comm, m->rank,
                    m->routing(*t), a);
}
}
