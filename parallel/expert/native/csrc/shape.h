// Sizes, the symmetric window of each rank, and the messages that travel between windows.
#pragma once
#include <cstddef>
#include <cstdint>

#include "order.h"

namespace ep {

constexpr int MAX_NODES = 32;   // a node per lane and per mask bit
constexpr int MAX_LOCALS = 32;  // a GPU of the node per lane and per mask bit
constexpr int MAX_TOP_K = 32;   // a copy per lane

// Equal on every rank. rank = node * locals + local; expert e lives on rank e / (experts / ranks).
struct Shape {
  int32_t nodes, locals, channels;
  int32_t ring;        // slots of each ring
  int32_t chunk;       // tokens to one node before its tail is signalled
  int32_t top_k;       // most copies a token may have
  int32_t experts;
  int32_t row_bytes;   // most payload bytes of a token, FP32 partial sums included; a multiple of 16

  EP_BOTH int ranks() const { return nodes * locals; }
  EP_BOTH int local_experts() const { return experts / ranks(); }
  EP_BOTH int node_of(int expert) const { return expert / (experts / nodes); }
  EP_BOTH int local_of(int expert) const { return expert / local_experts() % locals; }
};

EP_BOTH size_t round16(size_t bytes) { return (bytes + 15) / 16 * 16; }

enum Format : int32_t { BYTES = 0, BF16 = 1, FP32 = 2 };
EP_BOTH int payload_bytes(int format, int dim) { return dim * (format == FP32 ? 4 : 2); }

// First 16 bytes of every message.
struct alignas(16) Header {
  int32_t rank;    // rank the token belongs to
  int32_t token;   // its index there
  int32_t format;  // Format of the payload
  int32_t bytes;   // of the payload
};

// A dispatch message: Header, int32 ids[K], int32 position[K] (place among this rank's copies for that expert),
// float weights[K], payload. A combine message has its K scalars in the place of weights and ids unused.
EP_BOTH size_t meta_bytes(int top_k) { return sizeof(Header) + round16(12 * (size_t)top_k); }

struct Meta {
  char* base;
  int top_k;
  EP_BOTH Header* header() const { return reinterpret_cast<Header*>(base); }
  EP_BOTH int32_t* ids() const { return reinterpret_cast<int32_t*>(base + sizeof(Header)); }
  EP_BOTH int32_t* position() const { return ids() + top_k; }
  EP_BOTH uint32_t* weights() const { return reinterpret_cast<uint32_t*>(ids() + 2 * top_k); }
  EP_BOTH char* payload() const { return base + meta_bytes(top_k); }
};

// What all ranks must agree on in a dispatch; compared by the notify stage.
struct alignas(16) Agreement {
  int32_t top_k, row_bytes, format, unused;
};

// Byte offsets in a window, the same on every rank; window_bytes is a multiple of 4096.
struct Layout {
  size_t abort, rail_abort, begun, notify_flag, local_flag, rail_tail, rail_head, nvl_tail, nvl_head;
  size_t notify_send, notify_in, local_in, stage, rail_in, nvl_in, window_bytes;
  size_t slot_bytes, notify_bytes, local_bytes;
  int channels, ring, nodes, ranks;

  EP_BOTH static Layout make(const Shape& s) {
    Layout l{};
    const size_t n = s.nodes, u = s.locals, c = s.channels, el = s.local_experts();
    l.channels = s.channels, l.ring = s.ring, l.nodes = s.nodes, l.ranks = s.ranks();
    l.slot_bytes = meta_bytes(s.top_k) + s.row_bytes;
    l.notify_bytes = sizeof(Agreement) + round16(4 * (u * el + c + u * c));
    l.local_bytes = round16(4 * (el + c));
    size_t at = 0;
    const auto take = [&at](size_t bytes) { const size_t here = at; at += (bytes + 127) / 128 * 128; return here; };
    l.abort = take(8), l.rail_abort = take(8);  // own node's and other nodes' word: one kind of atomic each
    l.begun = take(8);  // transfers begun by the rank
    l.notify_flag = take(8 * n), l.local_flag = take(8 * u);
    l.rail_tail = take(8 * n * c), l.rail_head = take(8 * n * c);
    l.nvl_tail = take(8 * u * c), l.nvl_head = take(8 * u * c);
    l.notify_send = take(2 * n * l.notify_bytes), l.notify_in = take(2 * n * l.notify_bytes);
    l.local_in = take(2 * n * u * l.local_bytes);
    l.stage = take(n * c * s.ring * l.slot_bytes), l.rail_in = take(n * c * s.ring * l.slot_bytes);
    l.nvl_in = take(u * c * s.ring * l.slot_bytes);
    l.window_bytes = (at + 4095) / 4096 * 4096;
    return l;
  }

  // Words and slots of the ring to or from node n (or local GPU u), channel c.
  EP_BOTH size_t word(size_t region, int peer, int c) const { return region + 8 * ((size_t)peer * channels + c); }
  EP_BOTH size_t slot(size_t region, int peer, int c, uint64_t item) const {
    return region + (((size_t)peer * channels + c) * ring + item % ring) * slot_bytes;
  }
  EP_BOTH size_t notify(size_t region, uint64_t epoch, int node) const {
    return region + ((epoch & 1) * nodes + node) * notify_bytes;
  }
  EP_BOTH size_t local_notify(uint64_t epoch, int source) const {
    return local_in + ((epoch & 1) * ranks + source) * local_bytes;
  }
};

// Items ever sent and received on each ring, kept between kernels, so that no ring is ever reset: [channel][peer].
struct Progress {
  uint64_t *rail_sent, *rail_got, *nvl_sent, *nvl_got;
};

// The routing of one dispatch: what a handle holds. Sizes in int32; the last two are known after the notify stage.
// Order of a channel's tokens, the same for all ranks of a rail: source nodes from (channel % nodes) on, tokens rising.
struct Routing {
  int32_t tokens, top_k;
  int32_t *ids, *position;                 // [tokens * top_k]
  int32_t* expert_tokens;                  // [experts]: own copies for each
  int32_t* node_tokens;                    // [nodes * channels]: own tokens for each node
  int32_t* gpu_tokens;                     // [nodes * locals * channels]
  int32_t* arrived;                        // [ranks * local_experts]: copies from each rank for each expert here
  int32_t* from_node;                      // [nodes * channels]: tokens that come over the own rail
  int32_t* from_rank;                      // [ranks * channels]: tokens that come to this GPU
  int32_t* row_base;                       // [local_experts * ranks]
  int32_t* forward_base;                   // [channels * nodes + 1]
  int32_t* arrival_base;                   // [locals * channels * nodes + 1]
  int32_t* cursor;                         // [ranks * channels]
  int32_t* totals;                         // rows, forwarded tokens, arrived tokens, then rows of each local expert
  uint32_t* forward_mask;                  // [forwarded]: GPUs of this node that want the token
  int32_t* arrival;                        // [arrived * (top_k + 1)]: token, then row of each copy or -1

  // Lays the parts out in `fixed`; returns their number of int32 (so a null pointer asks for the size).
  EP_BOTH size_t place(const Shape& s, int num_tokens, int k, int32_t* fixed) {
    size_t at = 0;
    const auto take = [&at, fixed](size_t n) { int32_t* here = fixed + at; at += (n + 3) / 4 * 4; return here; };
    const size_t c = s.channels, n = s.nodes, u = s.locals, el = s.local_experts(), copies = (size_t)num_tokens * k;
    tokens = num_tokens, top_k = k;
    ids = take(copies), position = take(copies), expert_tokens = take(s.experts);
    node_tokens = take(n * c), gpu_tokens = take(n * u * c), arrived = take(n * u * el), from_node = take(n * c);
    from_rank = take(n * u * c), row_base = take(el * n * u), forward_base = take(c * n + 1);
    arrival_base = take(u * c * n + 1), cursor = take(n * u * c), totals = take(3 + el);
    return at;
  }
  EP_BOTH void place_lists(int32_t* lists, int num_forwarded) {
    forward_mask = reinterpret_cast<uint32_t*>(lists);
    arrival = lists + (num_forwarded + 3) / 4 * 4;
  }
};

enum Counter : int {
  DISPATCH_RAIL_TOKENS, DISPATCH_RAIL_BYTES, DISPATCH_NVL_TOKENS, COMBINE_RAIL_TOKENS, COMBINE_RAIL_BYTES,
  COMBINE_NVL_TOKENS, NOTIFY_RAIL_BYTES, NUM_COUNTERS
};

}  // namespace ep
