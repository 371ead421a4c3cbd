// Combine: the rows of each token back to its rank and summed, in FP32 and in a fixed order.
//
//   NVLink send             rows of a token on this GPU, summed over its copies -> ring of the forwarder
//   forward and accumulate  summed over the GPUs of the node -> over the rail to the token's rank
//   IB receive, accumulate  summed over the nodes -> output
//
// What is rounded where: a lone BF16 row travels as it is, a sum over NVLink as FP32, a node's sum over the rail in
// `wire` format (the own node's always FP32), the result once to the format of the rows.
#pragma once
#include "rings.h"

namespace ep {

struct CombineArguments {
  const char* rows;             // [totals[0]][row_bytes]
  const uint32_t* row_weights;  // [totals[0]] FP32 bits, or null: no scalars travel
  char* sum;                    // [tokens][row_bytes]
  uint32_t* weights;            // [tokens * top_k], or null
  int dim;                      // values per row, a multiple of 8
  int format;                   // Format of rows and sum: BF16 or FP32
  int wire;                     // Format of a node's sum on the rail
};



// The messages' sizes say whether all ranks sum rows of the same length.
template <class D>
EP_FN bool same_dim(D& d, Post post, const Header& h, int dim, int peer) {
  return same_shape(d, post, h, h.format == FP32 ? FP32 : BF16, payload_bytes(h.format, dim), peer);
}

template <class D>
EP_FN void send_sum(D& d, const Routing& r, const CombineArguments& a, const int32_t* entry, Meta m) {
  typename D::Lanes rows(d);
  uint32_t copies = 0;
  for (int k = d.lane(); k < r.top_k; k += D::WIDTH) {
    const int row = entry[1 + k];
    rows.put(k, row < 0 ? 0 : row);
    if (row >= 0) copies |= 1u << k;
    m.weights()[k] = row >= 0 && a.row_weights != nullptr ? a.row_weights[row] : 0;
  }
  copies = d.reduce_or(copies);
  const int format = popcount(copies) > 1 ? FP32 : a.format, bytes = payload_bytes(a.format, a.dim);
  if (d.lane() == 0) *m.header() = Header{d.rank(), entry[0], format, payload_bytes(format, a.dim)};
  const auto from = [&](int k) { return a.rows + (size_t)rows.get(k) * bytes; };
  if (popcount(copies) == 1) d.fan_out(from(lowest(copies)), bytes, 1, [&](int) { return m.payload(); });
  else sum_rows(d, copies, a.format == FP32 ? copies : 0, a.dim / 8, m.payload(), true, from);
}

template <class D>
EP_FN void combine_send(D& d, const Shape& s, const Layout& l, const Progress& p, const Routing& r,
                        const CombineArguments& a, int c) {
  const Post post{COMBINE_SENDER, c};
  typename D::Lanes sent(d, p.nvl_sent + c * s.locals, s.locals), freed(d), next(d), end(d);
  uint64_t open = 0, tokens = 0;
  for (int u = 0; u < s.locals; ++u) {
    next.set(u, r.arrival_base[(u * s.channels + c) * s.nodes]);
    end.set(u, r.arrival_base[(u * s.channels + c + 1) * s.nodes]);
    open += end.get(u) - next.get(u);
  }
  Patience<D> patience(d, post);
  // Never blocks on one forwarder: another may be what that one waits for.
  for (int i = 0, idle = 0; open != 0; ++i) {
    const int u = (d.local() + i) % s.locals;
    const size_t head = l.word(l.nvl_head, u, c);
    if (next.get(u) == end.get(u) || !has_room<COMBINE_SEND_ROOM>(d, l, sent, freed, u, head)) {
      if (++idle % s.locals != 0) continue;
      int late = 0;
      while (next.get(late) == end.get(late)) ++late;
      if (!patience.wait(rank_of_local(d, s, late), sent.get(late) + 1, freed.get(late) + l.ring)) return;
      continue;
    }
    idle = 0, patience.progress();
    const Meta m{d.peer(u, l.slot(l.nvl_in, d.local(), c, sent.get(u))), r.top_k};
    send_sum(d, r, a, r.arrival + next.get(u) * (r.top_k + 1), m);
    d.sync();
    d.template nvl_add<COMBINE_SEND_TAIL>(u, l.word(l.nvl_tail, d.local(), c), 1);
    next.add(u, 1), sent.add(u, 1), --open, ++tokens;
  }
  sent.store(p.nvl_sent + c * s.locals, s.locals);
  d.count(COMBINE_NVL_TOKENS, tokens);
}

// Which of the messages at(i), i in mask, are FP32; false if one is of another length or of another token than the rest.
template <class D, class At>
EP_FN bool inspect(D& d, Post post, const CombineArguments& a, int token, uint32_t mask, At at, uint32_t& fp32) {
  fp32 = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const Header h = *at(lowest(rest)).header();
    if (!same_dim(d, post, h, a.dim, h.rank)) return false;
    if (h.token != token) {
      d.fail(Failure{DISORDER, post.role, post.channel, d.rank(), h.rank, NO_ARGUMENT}, token, h.token);
      return false;
    }
    fp32 |= (uint32_t)(h.format == FP32) << lowest(rest);
  }
  return true;
}

// The scalars of a token: each copy's comes from exactly one place, the others are zero bits.
template <class D, class At>
EP_FN void merge_weights(D& d, int top_k, uint32_t mask, At at, uint32_t* target) {
  typename D::Lanes merged(d);
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const uint32_t* in = at(lowest(rest)).weights();
    for (int k = d.lane(); k < top_k; k += D::WIDTH) merged.put(k, merged.get_own(k) | in[k]);
  }
  for (int k = d.lane(); k < top_k; k += D::WIDTH) target[k] = (uint32_t)merged.get_own(k);
}

template <class D>
EP_FN void combine_forward(D& d, const Shape& s, const Layout& l, const Progress& p, const Routing& r,
                           const CombineArguments& a, int c) {
  const Post post{COMBINE_FORWARDER, c};
  const int me = d.node();
  typename D::Lanes got(d, p.nvl_got + c * s.locals, s.locals), uncredited(d);
  typename D::Lanes sent(d, p.rail_sent + c * s.nodes, s.nodes), freed(d);
  uint64_t unsignalled = 0, tokens = 0, rail_bytes = 0;
  const auto signal = [&](int n) {
    if (unsignalled == 0) return;
    d.template rail_add<UNORDERED, COMBINE_FORWARD_SIGNAL, true>(n, l.word(l.rail_tail, me, c), unsignalled, c);
    unsignalled = 0;
  };
  const auto credit = [&](int u) {
    if (uncredited.get(u) == 0) return;
    d.template nvl_add<COMBINE_FORWARD_CREDIT>(u, l.word(l.nvl_head, d.local(), c), uncredited.get(u));
    uncredited.set(u, 0);
  };
  const auto in = [&](int u) { return Meta{d.own(l.slot(l.nvl_in, u, c, got.get(u))), r.top_k}; };
  for (int i = 0; i < s.nodes; ++i) {
    const int n = (c + i) % s.nodes;
    const int32_t* base = r.forward_base + c * s.nodes + i;
    for (int at = base[0]; at < base[1]; ++at) {
      const uint32_t gpus = r.forward_mask[at];
      for (uint32_t rest = gpus; rest != 0; rest &= rest - 1) {
        const int u = lowest(rest);
        if (!await_word<COMBINE_FORWARD_WAIT>(d, post, l.word(l.nvl_tail, u, c), got.get(u) + 1, rank_of_local(d, s, u)))
          return;
      }
      const size_t head = l.word(l.rail_head, n, c);
      if (!has_room<COMBINE_FORWARD_ROOM>(d, l, sent, freed, n, head)) {
        signal(n);
        if (!await_room<COMBINE_FORWARD_ROOM>(d, post, l, sent, freed, n, head, rank_on_rail(d, s, n))) return;
      }
      uint32_t fp32;
      const int token = in(lowest(gpus)).header()->token;
      if (!inspect(d, post, a, token, gpus, in, fp32)) return;
      const int format = n == me ? FP32 : a.wire;
      const Meta m{d.own(l.slot(n == me ? l.rail_in : l.stage, n, c, sent.get(n))), r.top_k};
      if (d.lane() == 0) *m.header() = Header{d.rank(), token, format, payload_bytes(format, a.dim)};
      merge_weights(d, r.top_k, gpus, in, m.weights());
      sum_rows(d, gpus, fp32, a.dim / 8, m.payload(), format == FP32, [&](int u) { return in(u).payload(); });
      d.sync();
      for (uint32_t rest = gpus; rest != 0; rest &= rest - 1) {
        const int u = lowest(rest);
        got.add(u, 1), uncredited.add(u, 1);
        if (uncredited.get(u) >= credit_step(s)) credit(u);
      }
      if (n == me) {
        d.template nvl_add<COMBINE_FORWARD_SELF>(d.local(), l.word(l.rail_tail, me, c), 1);
      } else {
        const size_t bytes = meta_bytes(r.top_k) + payload_bytes(format, a.dim);
        d.template rail_put<COMBINE_FORWARD_POST>(n, l.slot(l.rail_in, me, c, sent.get(n)),
                                                  l.slot(l.stage, n, c, sent.get(n)), bytes, c);
        ++tokens, rail_bytes += bytes;
        if (++unsignalled >= (uint64_t)s.chunk) signal(n);
      }
      sent.add(n, 1);
    }
    signal(n);  // before the next node: its source may wait for a node that waits for this one
  }
  for (int u = 0; u < s.locals; ++u) credit(u);
  got.store(p.nvl_got + c * s.locals, s.locals), sent.store(p.rail_sent + c * s.nodes, s.nodes);
  d.count(COMBINE_RAIL_TOKENS, tokens);
  d.count(COMBINE_RAIL_BYTES, rail_bytes);
}

template <class D>
EP_FN void combine_receive(D& d, const Shape& s, const Layout& l, const Progress& p, const Routing& r,
                           const CombineArguments& a, int c) {
  const Post post{COMBINE_RECEIVER, c};
  const int me = d.node();
  typename D::Lanes got(d, p.rail_got + c * s.nodes, s.nodes), uncredited(d);
  const auto credit = [&](int n) {
    const size_t head = l.word(l.rail_head, me, c);
    if (uncredited.get(n) == 0) return;
    if (n == me) d.template nvl_add<COMBINE_RECEIVE_SELF_CREDIT>(d.local(), head, uncredited.get(n));
    else d.template rail_add<COMBINE_RECEIVE_CREDIT, UNORDERED, false>(n, head, uncredited.get(n), c);
    uncredited.set(n, 0);
  };
  const auto in = [&](int n) { return Meta{d.own(l.slot(l.rail_in, n, c, got.get(n))), r.top_k}; };
  for (int t = c; t < r.tokens; t += s.channels) {
    const uint32_t nodes = node_mask(d, s, r.ids + (size_t)t * r.top_k, r.top_k);
    for (uint32_t rest = nodes; rest != 0; rest &= rest - 1) {
      const int n = lowest(rest);
      if (!await_word<COMBINE_RECEIVE_WAIT>(d, post, l.word(l.rail_tail, n, c), got.get(n) + 1, rank_on_rail(d, s, n)))
        return;
    }
    uint32_t fp32;
    if (!inspect(d, post, a, t, nodes, in, fp32)) return;
    sum_rows(d, nodes, fp32, a.dim / 8, a.sum + (size_t)t * payload_bytes(a.format, a.dim), a.format == FP32,
             [&](int n) { return in(n).payload(); });
    if (a.weights != nullptr) merge_weights(d, r.top_k, nodes, in, a.weights + (size_t)t * r.top_k);
    d.sync();
    for (uint32_t rest = nodes; rest != 0; rest &= rest - 1) {
      const int n = lowest(rest);
      got.add(n, 1), uncredited.add(n, 1);
      if (uncredited.get(n) >= credit_step(s)) credit(n);
    }
  }
  for (int n = 0; n < s.nodes; ++n) credit(n);
  got.store(p.rail_got + c * s.nodes, s.nodes);
}

}  // namespace ep
