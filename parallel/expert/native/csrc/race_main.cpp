// All ranks in one process, for ThreadSanitizer and for faults of the network: random routings, every value checked.
//   race_main NODES LOCALS CHANNELS RING TOKENS DIM SEED ROUNDS     exit 0: all values right
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "abi.h"
#include "rings.h"

extern "C" EpMachine* ep_open(const ep::Shape* s, int rank, void* world, const EpOptions* o);

namespace {

struct Rank {
  EpMachine* machine;
  std::vector<int64_t> ids;
  int tokens;
};

// Small whole numbers: every sum is exact in BF16, so any order gives the same bits.
float value(int rank, int token, int i) { return (float)((rank * 5 + token * 3 + i) % 16); }

struct alignas(16) Block { char byte[16]; };

void put(std::vector<Block>& rows, size_t index, int format, float v) {
  if (format == ep::FP32) std::memcpy((char*)rows.data() + 4 * index, &v, 4);
  else { const uint16_t b = (uint16_t)ep::to_bf16(v); std::memcpy((char*)rows.data() + 2 * index, &b, 2); }
}
float get(const std::vector<Block>& rows, size_t index, int format) {
  float v;
  uint16_t b;
  if (format == ep::FP32) { std::memcpy(&v, (const char*)rows.data() + 4 * index, 4); return v; }
  std::memcpy(&b, (const char*)rows.data() + 2 * index, 2);
  return ep::bits_to_float((uint32_t)b << 16);
}

// One layer's way: notify, dispatch, combine, and dispatch again along the same routing. Returns the number of wrong values.
long one_round(const ep::Shape& s, std::vector<Rank>& ranks, int me, int k, int dim, int format) {
  Rank& own = ranks[me];
  const int row_bytes = ep::payload_bytes(format, dim), el = s.local_experts();
  std::vector<int32_t> fixed(ep_routing_ints(&s, own.tokens, k));
  const int32_t* totals = fixed.data() + ep_totals_at(&s, own.tokens, k);
  EpTransfer t{own.tokens, k, 0, fixed.data(), nullptr};
  std::vector<Block> x((size_t)own.tokens * row_bytes / 16 + 1), sum(x.size());
  std::vector<float> weights((size_t)own.tokens * k), back(weights.size());
  for (int i = 0; i < own.tokens; ++i)
    for (int j = 0; j < dim; ++j) put(x, (size_t)i * dim + j, format, value(me, i, j));
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = (float)(me * 1000 + (int)i) + 0.5f;
  if (ep_notify(own.machine, &t, own.ids.data(), row_bytes, format)) return 1;
  t.forwarded = totals[1];
  std::vector<int32_t> lists((totals[1] + 3) / 4 * 4 + (size_t)totals[2] * (k + 1));
  t.lists = lists.data();
  std::vector<Block> rows((size_t)totals[0] * row_bytes / 16 + 1);
  std::vector<float> row_weights(totals[0]);
  long wrong = 0;
  const auto check = [&] {
    size_t row = 0;
    for (int e = me * el; e < (me + 1) * el; ++e)
      for (int r = 0; r < s.ranks(); ++r)
        for (size_t i = 0; i < ranks[r].ids.size(); ++i) {
          if (ranks[r].ids[i] != e) continue;
          wrong += row_weights[row] != (float)(r * 1000 + (int)i) + 0.5f;
          for (int j = 0; j < dim; ++j) wrong += get(rows, row * dim + j, format) != value(r, (int)i / k, j);
          ++row;
        }
    wrong += (int32_t)row != totals[0];
  };
  if (ep_dispatch(own.machine, &t, x.data(), weights.data(), rows.data(), row_weights.data(), row_bytes, format)) return 1;
  check();
  if (ep_combine(own.machine, &t, rows.data(), row_weights.data(), sum.data(), back.data(), dim, format, format)) return 1;
  for (size_t i = 0; i < weights.size(); ++i) wrong += back[i] != (own.ids[i] < 0 ? 0.0f : weights[i]);
  for (int i = 0; i < own.tokens; ++i) {
    int copies = 0;
    for (int j = 0; j < k; ++j) copies += own.ids[(size_t)i * k + j] >= 0;
    for (int j = 0; j < dim; ++j) wrong += get(sum, (size_t)i * dim + j, format) != copies * value(me, i, j);
  }
  if (ep_dispatch(own.machine, &t, x.data(), weights.data(), rows.data(), row_weights.data(), row_bytes, format)) return 1;
  check();
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 9) return std::fprintf(stderr, "race_main NODES LOCALS CHANNELS RING TOKENS DIM SEED ROUNDS\n"), 2;
  int n[8];
  for (int i = 0; i < 8; ++i) n[i] = std::atoi(argv[i + 1]);
  const int k = 4, tokens = n[4], dim = n[5], rounds = n[7];
  const ep::Shape s{n[0], n[1], n[2], n[3], 2, k, 2 * n[0] * n[1], 4 * dim};
  const size_t bytes = ep_window_bytes(&s) * s.ranks();
  void* world = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  const EpOptions options{20000000000ull, (uint64_t)n[6], 0, 0};
  std::mt19937 random((unsigned)n[6]);
  std::vector<Rank> ranks(s.ranks());
  for (int r = 0; r < s.ranks(); ++r) ranks[r].machine = ep_open(&s, r, world, &options);
  long wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    for (auto& rank : ranks) {
      rank.tokens = tokens + (int)(random() % 3);
      rank.ids.resize((size_t)rank.tokens * k);
      for (auto& id : rank.ids) id = (int64_t)(random() % (s.experts + 1)) - 1;
    }
    std::vector<long> found(s.ranks());
    std::vector<std::thread> threads;
    for (int r = 0; r < s.ranks(); ++r)
      threads.emplace_back([&, r] { found[r] = one_round(s, ranks, r, k, dim, round % 2 ? ep::BF16 : ep::FP32); });
    for (auto& thread : threads) thread.join();
    for (const long f : found) wrong += f;
  }
  for (auto& rank : ranks) ep_close(rank.machine);
  std::printf("%ld wrong values\n", wrong);
  return wrong != 0;
}
