// Before a first dispatch: who sends how many tokens to whom, so that every row has its final place from the start.
//
// layout (local)   -> place of each copy among this rank's copies for its expert; tokens per node, GPU and channel
// exchange         -> over the rail to the GPU of the same index on each node, from there to each GPU of the node
// tables (local)   -> first row of (expert, source rank); where each source's tokens stand in the lists for combine
#pragma once
#include "rings.h"

namespace ep {

struct NotifyArguments {
  const int64_t* ids;    // [tokens * top_k]: global expert, or -1
  Agreement agreement;
  uint64_t epoch;        // notify stages before this one
};

template <class D>
EP_FN void count_expert(D& d, const Routing& r, const int64_t* ids, int expert) {
  const int copies = r.tokens * r.top_k;
  int count = 0;
  for (int base = 0; base < copies; base += D::WIDTH) {
    const int i = base + d.lane();
    const bool mine = i < copies && ids[i] == expert;
    const uint32_t hits = d.ballot(mine);
    if (mine) r.position[i] = count + popcount(hits & ((1u << d.lane()) - 1));
    count += popcount(hits);
  }
  if (d.lane() == 0) r.expert_tokens[expert] = count;
}

template <class D>
EP_FN void count_channel(D& d, const Shape& s, const Routing& r, const int64_t* ids, int node, int c) {
  typename D::Lanes gpu_tokens(d);
  int tokens = 0;
  for (int first = c; first < r.tokens; first += s.channels * D::WIDTH) {
    const int t = first + d.lane() * s.channels;
    uint32_t mask = 0;
    for (int k = 0; t < r.tokens && k < r.top_k; ++k) {
      const int64_t id = ids[(size_t)t * r.top_k + k];
      if (id >= 0 && id < s.experts && s.node_of((int)id) == node) mask |= 1u << s.local_of((int)id);
    }
    tokens += popcount(d.ballot(mask != 0));
    for (uint32_t rest = d.reduce_or(mask); rest != 0; rest &= rest - 1)
      gpu_tokens.add(lowest(rest), popcount(d.ballot(mask >> lowest(rest) & 1)));
  }
  if (d.lane() == 0) r.node_tokens[node * s.channels + c] = tokens;
  for (int u = 0; u < s.locals; ++u) {
    const int count = (int)gpu_tokens.get(u);
    if (d.lane() == 0) r.gpu_tokens[(node * s.locals + u) * s.channels + c] = count;
  }
}

// Warp `warp` of `warps`.
template <class D>
EP_FN void layout(D& d, const Shape& s, const Routing& r, const NotifyArguments& a, int warp, int warps) {
  const int copies = r.tokens * r.top_k;
  for (int i = warp * D::WIDTH + d.lane(); i < copies; i += warps * D::WIDTH) {
    const int64_t id = a.ids[i];
    const bool good = id >= -1 && id < s.experts;
    r.ids[i] = good ? (int32_t)id : -1;
    if (!good) d.fail(Failure{BAD_ID, LAYOUT, 0, d.rank(), d.rank(), NO_ARGUMENT}, s.experts, (uint64_t)id);
  }
  for (int expert = warp; expert < s.experts; expert += warps) count_expert(d, r, a.ids, expert);
  for (int i = warp; i < s.nodes * s.channels; i += warps)
    count_channel(d, s, r, a.ids, i / s.channels, i % s.channels);
}

// A block for a node: Agreement, copies for each expert of the node, tokens per channel, tokens per GPU and channel.
template <class D>
EP_FN void notify_send(D& d, const Shape& s, const Layout& l, const Routing& r, const NotifyArguments& a) {
  const int c = s.channels, node_experts = s.locals * s.local_experts();
  for (int i = 0; i < s.nodes; ++i) {
    const int n = (d.node() + i) % s.nodes;
    const bool self = n == d.node();
    const size_t target = l.notify(l.notify_in, a.epoch, d.node());
    const size_t staged = self ? target : l.notify(l.notify_send, a.epoch, n);
    if (d.lane() == 0) *reinterpret_cast<Agreement*>(d.own(staged)) = a.agreement;
    int32_t* block = reinterpret_cast<int32_t*>(d.own(staged + sizeof(Agreement)));
    for (int j = d.lane(); j < node_experts; j += D::WIDTH) block[j] = r.expert_tokens[n * node_experts + j];
    for (int j = d.lane(); j < c; j += D::WIDTH) block[node_experts + j] = r.node_tokens[n * c + j];
    for (int j = d.lane(); j < s.locals * c; j += D::WIDTH)
      block[node_experts + c + j] = r.gpu_tokens[n * s.locals * c + j];
    d.sync();
    if (self) {
      d.template nvl_add<NOTIFY_SELF>(d.local(), l.notify_flag + 8 * d.node(), 1);
    } else {
      d.template rail_put<NOTIFY_POST>(n, target, staged, l.notify_bytes, 0);
      d.template rail_add<UNORDERED, NOTIFY_SIGNAL, true>(n, l.notify_flag + 8 * d.node(), 1, 0);
      d.count(NOTIFY_RAIL_BYTES, l.notify_bytes);
    }
  }
}

template <class D>
EP_FN bool agrees(D& d, const Agreement& own, const Agreement& theirs, int peer) {
  const Argument differs = own.top_k != theirs.top_k           ? TOP_K
                           : own.row_bytes != theirs.row_bytes ? ROW_BYTES
                           : own.format != theirs.format       ? FORMAT
                                                               : NO_ARGUMENT;
  if (differs == NO_ARGUMENT) return true;
  d.fail(Failure{MISMATCH, NOTIFY_FORWARDER, 0, d.rank(), peer, differs},
         differs == TOP_K ? own.top_k : differs == ROW_BYTES ? own.row_bytes : own.format,
         differs == TOP_K ? theirs.top_k : differs == ROW_BYTES ? theirs.row_bytes : theirs.format);
  return false;
}

template <class D>
EP_FN void notify_forward(D& d, const Shape& s, const Layout& l, const Routing& r, const NotifyArguments& a) {
  const int c = s.channels, el = s.local_experts();
  for (int n = 0; n < s.nodes; ++n) {
    const int source = rank_on_rail(d, s, n);
    if (!await_word<NOTIFY_WAIT>(d, Post{NOTIFY_FORWARDER, 0}, l.notify_flag + 8 * n, a.epoch + 1, source)) return;
    const char* in = d.own(l.notify(l.notify_in, a.epoch, n));
    if (!agrees(d, a.agreement, *reinterpret_cast<const Agreement*>(in), source)) return;
    const int32_t* experts = reinterpret_cast<const int32_t*>(in + sizeof(Agreement));
    const int32_t *nodes = experts + s.locals * el, *gpus = nodes + c;
    for (int j = d.lane(); j < c; j += D::WIDTH) r.from_node[n * c + j] = nodes[j];
    for (int u = 0; u < s.locals; ++u) {
      int32_t* out = reinterpret_cast<int32_t*>(d.peer(u, l.local_notify(a.epoch, source)));
      for (int j = d.lane(); j < el; j += D::WIDTH) out[j] = experts[u * el + j];
      for (int j = d.lane(); j < c; j += D::WIDTH) out[el + j] = gpus[u * c + j];
      d.sync();
      d.template nvl_add<NOTIFY_FORWARD>(u, l.local_flag + 8 * d.local(), 1);
    }
  }
}

template <class D>
EP_FN void notify_receive(D& d, const Shape& s, const Layout& l, const Routing& r, const NotifyArguments& a) {
  const int c = s.channels, el = s.local_experts();
  for (int u = 0; u < s.locals; ++u) {
    const uint64_t wanted = (a.epoch + 1) * s.nodes;
    if (!await_word<NOTIFY_RECEIVE>(d, Post{NOTIFY_RECEIVER, 0}, l.local_flag + 8 * u, wanted, rank_of_local(d, s, u)))
      return;
    for (int n = 0; n < s.nodes; ++n) {
      const int source = n * s.locals + u;
      const int32_t* in = reinterpret_cast<const int32_t*>(d.own(l.local_notify(a.epoch, source)));
      for (int j = d.lane(); j < el; j += D::WIDTH) r.arrived[source * el + j] = in[j];
      for (int j = d.lane(); j < c; j += D::WIDTH) r.from_rank[source * c + j] = in[el + j];
    }
  }
}

template <class D>
EP_FN void tables(D& d, const Shape& s, const Routing& r) {
  const int ranks = s.ranks(), el = s.local_experts(), c = s.channels, nodes = s.nodes;
  int rows = 0;
  for (int e = 0; e < el; ++e) {
    const int before = rows;
    rows = d.prefix(ranks, rows, [&](int i) { return r.arrived[i * el + e]; },
                    [&](int i, int sum) { r.row_base[e * ranks + i] = sum; });
    if (d.lane() == 0) r.totals[3 + e] = rows - before;
  }
  const int forwarded = d.prefix(
      c * nodes, 0, [&](int i) { return r.from_node[(i / nodes + i) % nodes * c + i / nodes]; },
      [&](int i, int sum) { r.forward_base[i] = sum; });
  const int arrived = d.prefix(
      s.locals * c * nodes, 0,
      [&](int i) {
        const int channel = i / nodes % c, node = (channel + i) % nodes;
        return r.from_rank[(node * s.locals + i / nodes / c) * c + channel];
      },
      [&](int i, int sum) { r.arrival_base[i] = sum; });
  if (d.lane() == 0) {
    r.forward_base[c * nodes] = forwarded, r.arrival_base[s.locals * c * nodes] = arrived;
    r.totals[0] = rows, r.totals[1] = forwarded, r.totals[2] = arrived;
  }
}

}  // namespace ep
