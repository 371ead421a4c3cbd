// Dispatch: tokens to the GPUs of their experts, over the rail once per node and over NVLink once per GPU.
//
//   IB send            x rows -> ring on the GPU of the same index of each destination node
//   forward            that ring -> rings of the GPUs of the node that want the token
//   NVLink receive     those rings -> final rows, sorted by expert, then source rank, then token
#pragma once
#include "rings.h"

namespace ep {

struct DispatchArguments {
  const char* x;           // [tokens][row_bytes]
  const uint32_t* weights; // [tokens * top_k] FP32 bits, or null
  char* rows;              // [totals[0]][row_bytes]
  uint32_t* row_weights;   // [totals[0]], or null
  int row_bytes, format;
};

template <class D>
EP_FN void write_meta(D& d, const Meta& m, const Header& h, const Routing& r, const DispatchArguments& a) {
  if (d.lane() == 0) *m.header() = h;
  for (int k = d.lane(); k < r.top_k; k += D::WIDTH) {
    const size_t copy = (size_t)h.token * r.top_k + k;
    m.ids()[k] = r.ids[copy];
    m.position()[k] = r.ids[copy] < 0 ? 0 : r.position[copy];
    m.weights()[k] = a.weights == nullptr ? 0 : a.weights[copy];
  }
}

template <class D>
EP_FN void dispatch_send(D& d, const Shape& s, const Layout& l, const Progress& p, const Routing& r,
                         const DispatchArguments& a, int c) {
  const Post post{DISPATCH_SENDER, c};
  const int me = d.node();
  const size_t bytes = meta_bytes(r.top_k) + a.row_bytes;
  typename D::Lanes sent(d, p.rail_sent + c * s.nodes, s.nodes), freed(d), unsignalled(d);
  uint64_t tokens = 0;
  const auto signal = [&](int n) {
    if (unsignalled.get(n) == 0) return;
    d.template rail_add<UNORDERED, DISPATCH_SEND_SIGNAL, true>(n, l.word(l.rail_tail, me, c), unsignalled.get(n), c);
    unsignalled.set(n, 0);
  };
  const auto slot = [&](int n) {  // the own node's ring directly, another's from a copy that stays until credited
    return d.own(l.slot(n == me ? l.rail_in : l.stage, n, c, sent.get(n)));
  };
  for (int t = c; t < r.tokens; t += s.channels) {
    const uint32_t nodes = node_mask(d, s, r.ids + (size_t)t * r.top_k, r.top_k);
    for (uint32_t rest = nodes; rest != 0; rest &= rest - 1) {
      const int n = lowest(rest);
      const size_t head = l.word(l.rail_head, n, c);
      if (has_room<DISPATCH_SEND_ROOM>(d, l, sent, freed, n, head)) continue;
      signal(n);
      if (!await_room<DISPATCH_SEND_ROOM>(d, post, l, sent, freed, n, head, rank_on_rail(d, s, n))) return;
    }
    for (uint32_t rest = nodes; rest != 0; rest &= rest - 1)
      write_meta(d, Meta{slot(lowest(rest)), r.top_k}, Header{d.rank(), t, a.format, a.row_bytes}, r, a);
    d.fan_out(a.x + (size_t)t * a.row_bytes, a.row_bytes, nodes,
              [&](int n) { return Meta{slot(n), r.top_k}.payload(); });
    for (int i = 0; i < s.nodes; ++i) {
      const int n = (me + i) % s.nodes;
      if ((nodes >> n & 1) == 0) continue;
      if (n == me) {
        d.template nvl_add<DISPATCH_SEND_SELF>(d.local(), l.word(l.rail_tail, me, c), 1);
      } else {
        d.template rail_put<DISPATCH_SEND_POST>(n, l.slot(l.rail_in, me, c, sent.get(n)),
                                                l.slot(l.stage, n, c, sent.get(n)), bytes, c);
        unsignalled.add(n, 1), ++tokens;
        if (unsignalled.get(n) >= (uint64_t)s.chunk) signal(n);
      }
      sent.add(n, 1);
    }
  }
  for (int n = 0; n < s.nodes; ++n) signal(n);
  sent.store(p.rail_sent + c * s.nodes, s.nodes);
  d.count(DISPATCH_RAIL_TOKENS, tokens);
  d.count(DISPATCH_RAIL_BYTES, tokens * bytes);
}

template <class D>
EP_FN void dispatch_forward(D& d, const Shape& s, const Layout& l, const Progress& p, const Routing& r,
                            const DispatchArguments& a, int c) {
  const Post post{DISPATCH_FORWARDER, c};
  const int me = d.node();
  typename D::Lanes got(d, p.rail_got + c * s.nodes, s.nodes), left(d), next(d), uncredited(d);
  typename D::Lanes sent(d, p.nvl_sent + c * s.locals, s.locals), freed(d);
  const auto credit = [&](int n) {
    const size_t head = l.word(l.rail_head, me, c);
    if (uncredited.get(n) == 0) return;
    if (n == me) d.template nvl_add<DISPATCH_FORWARD_SELF_CREDIT>(d.local(), head, uncredited.get(n));
    else d.template rail_add<DISPATCH_FORWARD_CREDIT, UNORDERED, false>(n, head, uncredited.get(n), c);
    uncredited.set(n, 0);
  };
  uint64_t open = 0, tokens = 0;
  for (int n = 0; n < s.nodes; ++n) {
    left.set(n, r.from_node[n * s.channels + c]), open += left.get(n);
    next.set(n, r.forward_base[c * s.nodes + (n + s.nodes - c % s.nodes) % s.nodes]);
  }
  Patience<D> patience(d, post);
  for (int n = 0, idle = 0; open != 0; n = (n + 1) % s.nodes) {
    const uint64_t tail = left.get(n) == 0 ? 0 : d.template load<DISPATCH_FORWARD_WAIT>(l.word(l.rail_tail, n, c));
    if (left.get(n) != 0 && got.get(n) < tail) idle = 0, patience.progress();
    else if (++idle % s.nodes == 0) {
      int late = 0;
      while (left.get(late) == 0) ++late;
      if (!patience.wait(rank_on_rail(d, s, late), got.get(late) + left.get(late), got.get(late))) return;
    }
    for (; left.get(n) != 0 && got.get(n) < tail; --open) {
      const Meta m{d.own(l.slot(l.rail_in, n, c, got.get(n))), r.top_k};
      if (!same_shape(d, post, *m.header(), a.format, a.row_bytes, rank_on_rail(d, s, n))) return;
      const uint32_t gpus = gpu_mask(d, s, m.ids(), r.top_k);
      for (uint32_t rest = gpus; rest != 0; rest &= rest - 1) {
        const int u = lowest(rest);
        if (!await_room<DISPATCH_FORWARD_ROOM>(d, post, l, sent, freed, u, l.word(l.nvl_head, u, c), rank_of_local(d, s, u)))
          return;
      }
      d.fan_out(m.base, meta_bytes(r.top_k) + a.row_bytes, gpus,
                [&](int u) { return d.peer(u, l.slot(l.nvl_in, d.local(), c, sent.get(u))); });
      for (uint32_t rest = gpus; rest != 0; rest &= rest - 1, ++tokens) {
        d.template nvl_add<DISPATCH_FORWARD_TAIL>(lowest(rest), l.word(l.nvl_tail, d.local(), c), 1);
        sent.add(lowest(rest), 1);
      }
      const uint64_t at = next.get(n);
      if (d.lane() == 0) r.forward_mask[at] = gpus;
      next.add(n, 1), got.add(n, 1), left.set(n, left.get(n) - 1), uncredited.add(n, 1);
      if (uncredited.get(n) >= credit_step(s)) credit(n);
    }
  }
  for (int n = 0; n < s.nodes; ++n) credit(n);
  got.store(p.rail_got + c * s.nodes, s.nodes), sent.store(p.nvl_sent + c * s.locals, s.locals);
  d.count(DISPATCH_NVL_TOKENS, tokens);
}

// Puts the copies of one arrived token into their rows, and notes the rows for combine.
template <class D>
EP_FN void place_token(D& d, const Shape& s, const Routing& r, const DispatchArguments& a, const Meta& m, int c) {
  const int source = m.header()->rank, ranks = s.ranks();
  int at = 0;
  if (d.lane() == 0) {
    at = r.cursor[source * s.channels + c]++;
    r.arrival[(size_t)at * (r.top_k + 1)] = m.header()->token;
  }
  at = (int)d.broadcast(at);
  typename D::Lanes rows(d);
  uint32_t copies = 0;
  for (int k = d.lane(); k < r.top_k; k += D::WIDTH) {
    const int id = m.ids()[k];
    const bool here = id >= 0 && id / s.local_experts() == d.rank();
    const int row = here ? r.row_base[id % s.local_experts() * ranks + source] + m.position()[k] : -1;
    r.arrival[(size_t)at * (r.top_k + 1) + 1 + k] = row;
    if (here && a.row_weights != nullptr) a.row_weights[row] = m.weights()[k];
    if (here) copies |= 1u << k;
    rows.put(k, row);
  }
  d.fan_out(m.payload(), a.row_bytes, d.reduce_or(copies),
            [&](int k) { return a.rows + (size_t)rows.get(k) * a.row_bytes; });
}

template <class D>
EP_FN void dispatch_receive(D& d, const Shape& s, const Layout& l, const Progress& p, const Routing& r,
                            const DispatchArguments& a, int c) {
  const Post post{DISPATCH_RECEIVER, c};
  typename D::Lanes got(d, p.nvl_got + c * s.locals, s.locals), left(d), uncredited(d);
  const auto credit = [&](int u) {
    if (uncredited.get(u) == 0) return;
    d.template nvl_add<DISPATCH_RECEIVE_CREDIT>(u, l.word(l.nvl_head, d.local(), c), uncredited.get(u));
    uncredited.set(u, 0);
  };
  uint64_t open = 0;
  for (int u = 0; u < s.locals; ++u)
    for (int n = 0; n < s.nodes; ++n) {
      const int source = (n * s.locals + u) * s.channels + c;
      const int i = (n + s.nodes - c % s.nodes) % s.nodes;
      if (d.lane() == 0) r.cursor[source] = r.arrival_base[(u * s.channels + c) * s.nodes + i];
      left.add(u, r.from_rank[source]), open += r.from_rank[source];
    }
  d.sync();
  Patience<D> patience(d, post);
  for (int u = 0, idle = 0; open != 0; u = (u + 1) % s.locals) {
    const uint64_t tail = left.get(u) == 0 ? 0 : d.template load<DISPATCH_RECEIVE_WAIT>(l.word(l.nvl_tail, u, c));
    if (left.get(u) != 0 && got.get(u) < tail) idle = 0, patience.progress();
    else if (++idle % s.locals == 0) {
      int late = 0;
      while (left.get(late) == 0) ++late;
      if (!patience.wait(rank_of_local(d, s, late), got.get(late) + left.get(late), got.get(late))) return;
    }
    for (; left.get(u) != 0 && got.get(u) < tail; --open) {
      const Meta m{d.own(l.slot(l.nvl_in, u, c, got.get(u))), r.top_k};
      if (!same_shape(d, post, *m.header(), a.format, a.row_bytes, rank_of_local(d, s, u))) return;
      place_token(d, s, r, a, m, c);
      got.add(u, 1), left.set(u, left.get(u) - 1), uncredited.add(u, 1);
      if (uncredited.get(u) >= credit_step(s)) credit(u);
    }
  }
  for (int u = 0; u < s.locals; ++u) credit(u);
  got.store(p.nvl_got + c * s.locals, s.locals);
}

}  // namespace ep
