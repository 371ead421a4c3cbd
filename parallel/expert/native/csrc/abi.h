// What Python calls, the same on a CPU and on a GPU. Sizes in bytes unless named otherwise; 0 is success, 1 means that
// ep_failure tells why.
#pragma once
#include "shape.h"

extern "C" {

struct EpOptions {
  uint64_t patience_ns;  // longest wait without progress
  uint64_t seed;         // host: faults of the network, 0 for an orderly one
  uint64_t dead_after;   // host: operations after which the network of this rank is dead, 0 for never
  uint64_t num_sms;      // GPU: blocks, one per SM, all resident together
};

struct EpTransfer {
  int32_t tokens, top_k, forwarded;  // forwarded: totals[1]
  int32_t *fixed, *lists;            // memory of the Routing
};

struct EpMachine;

size_t ep_window_bytes(const ep::Shape* shape);
size_t ep_routing_ints(const ep::Shape* shape, int tokens, int top_k);
size_t ep_totals_at(const ep::Shape* shape, int tokens, int top_k);  // int32 before totals[]
void ep_close(EpMachine* machine);
void ep_stop(EpMachine* machine);                         // ends every rank's kernels, for a mistake found elsewhere
void ep_failure(EpMachine* machine, int64_t* out);        // code, role, channel, rank, peer, argument, own, theirs
void ep_counters(EpMachine* machine, uint64_t* out);      // ep::Counter
int ep_notify(EpMachine* machine, const EpTransfer* t, const int64_t* ids, int row_bytes, int format);
int ep_dispatch(EpMachine* machine, const EpTransfer* t, const void* x, const void* weights, void* rows,
                void* row_weights, int row_bytes, int format);
int ep_combine(EpMachine* machine, const EpTransfer* t, const void* rows, const void* row_weights, void* sum,
               void* weights, int dim, int format, int wire);
}
