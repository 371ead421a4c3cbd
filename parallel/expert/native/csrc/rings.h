// What every role uses: waiting that ends, masks of destinations, sums in FP32.
//
// A kernel is a template over a machine D: one warp of a GPU, or one thread of a process (a warp of width 1).
//   WIDTH, lane(), node(), local(), rank()   where this warp is
//   own(off), peer(u, off)                   pointers into the windows of this rank and of a GPU of its node
//   load<SITE>(off)                          acquire a word of the own window, the same value on all lanes
//   nvl_add<SITE>(u, off, v)                 release-add to a word of a GPU of the node
//   rail_put<SITE>(n, dst, src, bytes, c)    release, then copy over the rail, queue c
//   rail_add<SITE, SIGNAL, STRONG>(n, off, v, c)   signal over the rail: strong = after all earlier puts of the queue
//   fan_out(src, bytes, mask, to)            copy to every destination to(i), i in mask
//   reduce_or, ballot, broadcast, prefix, sync    across the lanes
//   Lanes                                    one 64-bit value per peer, each in its own lane
//   pause(spins), now(), patience(), stopped(), culprit(peer), fail(failure, own, theirs), count(counter, n)
#pragma once
#include "failure.h"
#include "shape.h"

namespace ep {

EP_BOTH int lowest(uint32_t mask) {
#ifdef __CUDA_ARCH__
  return __ffs((int)mask) - 1;
#else
  return __builtin_ctz(mask);
#endif
}

EP_BOTH int popcount(uint32_t mask) {
#ifdef __CUDA_ARCH__
  return __popc(mask);
#else
  return __builtin_popcount(mask);
#endif
}

EP_BOTH int larger(int a, int b) { return a > b ? a : b; }

// A wait that gives up when another rank stopped, or after the time limit without progress (and then stops all ranks).
template <class D>
struct Patience {
  D& d;
  Post post;
  int spins = 0;
  uint64_t since = 0;
  EP_FN Patience(D& machine, Post at) : d(machine), post(at) {}
  EP_FN void progress() { spins = 0; }
  EP_FN bool wait(int peer, uint64_t wanted, uint64_t seen) {
    if (spins == 0) since = d.now();
    d.pause(spins++);
    if (d.stopped()) return false;
    if ((spins & (D::TICKS - 1)) != 0 || d.now() - since < d.patience() / 4 * quarters(peer)) return true;
    d.fail(Failure{TIMEOUT, post.role, post.channel, d.rank(), d.culprit(peer), NO_ARGUMENT}, wanted, seen);
    return false;
  }
  // Forwarders wait for other ranks at first hand, so they complain first; senders and receivers mostly wait for a
  // forwarder that waits, and who waits for its own rank certainly does.
  EP_FN int quarters(int peer) const {
    const bool forwards = post.role == NOTIFY_FORWARDER || post.role == DISPATCH_FORWARDER || post.role == COMBINE_FORWARDER;
    return 4 + (forwards ? 0 : 1) + (peer == d.rank() ? 2 : 0);
  }
};

// Waits until a word of the own window is at least `wanted`; false: the kernel must end.
template <int SITE, class D>
EP_FN bool await_word(D& d, Post post, size_t word, uint64_t wanted, int peer) {
  uint64_t seen = d.template load<SITE>(word);
  if (seen >= wanted) return true;
  Patience<D> patience(d, post);
  while (seen < wanted) {
    if (!patience.wait(peer, wanted, seen)) return false;
    seen = d.template load<SITE>(word);
  }
  return true;
}

// Whether the ring to peer i has a free slot; asks for new credits only if the known ones are used up.
template <int SITE, class D, class Lanes>
EP_FN bool has_room(D& d, const Layout& l, const Lanes& sent, Lanes& freed, int i, size_t head) {
  if (sent.get(i) - freed.get(i) < (uint64_t)l.ring) return true;
  freed.set(i, d.template load<SITE>(head));
  return sent.get(i) - freed.get(i) < (uint64_t)l.ring;
}

template <int SITE, class D, class Lanes>
EP_FN bool await_room(D& d, Post post, const Layout& l, const Lanes& sent, Lanes& freed, int i, size_t head, int peer) {
  if (has_room<SITE>(d, l, sent, freed, i, head)) return true;
  if (!await_word<SITE>(d, post, head, sent.get(i) - l.ring + 1, peer)) return false;
  freed.set(i, d.template load<SITE>(head));
  return true;
}

// Credits go back by half rings: the sender always has the other half.
EP_BOTH uint64_t credit_step(const Shape& s) { return s.ring > 1 ? s.ring / 2 : 1; }

// The rank of GPU u of this node, and of this GPU's index on node n.
template <class D>
EP_FN int rank_of_local(const D& d, const Shape& s, int u) { return d.node() * s.locals + u; }
template <class D>
EP_FN int rank_on_rail(const D& d, const Shape& s, int n) { return n * s.locals + d.local(); }

// Nodes, and GPUs of this node, that hold the experts of a token: each once, however many experts it has there.
template <class D>
EP_FN uint32_t node_mask(const D& d, const Shape& s, const int32_t* ids, int top_k) {
  uint32_t mask = 0;
  for (int k = d.lane(); k < top_k; k += D::WIDTH)
    if (ids[k] >= 0) mask |= 1u << s.node_of(ids[k]);
  return d.reduce_or(mask);
}
template <class D>
EP_FN uint32_t gpu_mask(const D& d, const Shape& s, const int32_t* ids, int top_k) {
  uint32_t mask = 0;
  for (int k = d.lane(); k < top_k; k += D::WIDTH)
    if (ids[k] >= 0 && s.node_of(ids[k]) == d.node()) mask |= 1u << s.local_of(ids[k]);
  return d.reduce_or(mask);
}

// A message of another size or format than this rank's: the ranks were called with different shapes.
template <class D>
EP_FN bool same_shape(D& d, Post post, const Header& h, int format, int bytes, int peer) {
  if (h.bytes == bytes && h.format == format) return true;
  const bool size = h.bytes != bytes;
  d.fail(Failure{MISMATCH, post.role, post.channel, d.rank(), peer, size ? ROW_BYTES : FORMAT},
         size ? bytes : format, size ? h.bytes : h.format);
  return false;
}

EP_BOTH float bits_to_float(uint32_t bits) {
  union { uint32_t u; float f; } x;
  x.u = bits;
  return x.f;
}
EP_BOTH uint32_t float_to_bits(float value) {
  union { uint32_t u; float f; } x;
  x.f = value;
  return x.u;
}
// Round to nearest even, NaN kept.
EP_BOTH uint32_t to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

struct alignas(16) Word { uint32_t v[4]; };  // one access of 16 bytes

// Octets: 8 values, 16 bytes of BF16 or 32 of FP32.
EP_BOTH void load_octet(const char* row, int octet, bool fp32, float (&x)[8]) {
  if (fp32) {
    const Word *words = reinterpret_cast<const Word*>(row) + 2 * (size_t)octet, a = words[0], b = words[1];
    EP_UNROLL for (int i = 0; i < 4; ++i) x[i] = bits_to_float(a.v[i]), x[4 + i] = bits_to_float(b.v[i]);
  } else {
    const Word a = reinterpret_cast<const Word*>(row)[octet];
    EP_UNROLL for (int i = 0; i < 4; ++i) x[2 * i] = bits_to_float(a.v[i] << 16), x[2 * i + 1] = bits_to_float(a.v[i] & 0xffff0000u);
  }
}
EP_BOTH void store_octet(char* row, int octet, bool fp32, const float (&x)[8]) {
  if (fp32) {
    Word a, b, *words = reinterpret_cast<Word*>(row) + 2 * (size_t)octet;
    EP_UNROLL for (int i = 0; i < 4; ++i) a.v[i] = float_to_bits(x[i]), b.v[i] = float_to_bits(x[4 + i]);
    words[0] = a, words[1] = b;
  } else {
    Word a;
    EP_UNROLL for (int i = 0; i < 4; ++i) a.v[i] = to_bf16(x[2 * i]) | to_bf16(x[2 * i + 1]) << 16;
    reinterpret_cast<Word*>(row)[octet] = a;
  }
}

// target = sum over i in mask, rising, of the row at from(i): FP32 additions, one rounding if the target is BF16.
// fp32_mask: which rows are FP32. An empty mask gives zeros.
template <class D, class From>
EP_FN void sum_rows(D& d, uint32_t mask, uint32_t fp32_mask, int octets, char* target, bool target_fp32, From from) {
  constexpr int BATCH = 4;
  for (int base = d.lane(); base - d.lane() < octets; base += D::WIDTH * BATCH) {
    float sum[BATCH][8] = {};
    bool first = true;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const int i = lowest(rest);
      const char* row = from(i);
      const bool fp32 = fp32_mask >> i & 1;
      EP_UNROLL for (int b = 0; b < BATCH; ++b) {
        const int octet = base + b * D::WIDTH;
        if (octet >= octets) continue;
        float x[8];
        load_octet(row, octet, fp32, x);
        EP_UNROLL for (int j = 0; j < 8; ++j) sum[b][j] = first ? x[j] : sum[b][j] + x[j];
      }
      first = false;
    }
    EP_UNROLL for (int b = 0; b < BATCH; ++b)
      if (base + b * D::WIDTH < octets) store_octet(target, base + b * D::WIDTH, target_fp32, sum[b]);
  }
}

}  // namespace ep
