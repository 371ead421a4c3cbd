// The C interface on the machine of a CPU: a kernel is a set of threads, one per warp.
#include <thread>
#include <vector>

#include "abi.h"
#include "abi_sizes.h"
#include "combine.h"
#include "dispatch.h"
#include "machine_host.h"
#include "notify.h"

using namespace ep;

struct EpMachine {
  HostRank host;
  std::vector<uint64_t> words;
  Progress progress{};
  uint64_t epoch = 0;

  EpMachine(const Shape& s, const Layout& l, int rank, char* world, const EpOptions& o)
      : host{s, l, rank, world, o.patience_ns, {world, l.window_bytes, rank, s.channels, o.seed, o.dead_after}},
        words(2 * (size_t)s.channels * (s.nodes + s.locals)) {
    const size_t rail = (size_t)s.channels * s.nodes, nvl = (size_t)s.channels * s.locals;
    progress = {words.data(), words.data() + rail, words.data() + 2 * rail, words.data() + 2 * rail + nvl};
  }
  Routing routing(const EpTransfer& t) const {
    Routing r{};
    r.place(host.shape, t.tokens, t.top_k, t.fixed);
    if (t.lists != nullptr) r.place_lists(t.lists, t.forwarded);
    return r;
  }
  bool failed() { return HostMachine(host).stopped(); }
};

namespace {

// Runs role(machine, channel) for every channel and role, a thread each, and waits for all.
template <class... Roles>
int run(EpMachine* m, int channels, Roles... roles) {
  if (m->failed()) return 1;
  HostMachine(m->host).begin();
  m->host.network.begin();
  std::vector<std::thread> warps;
  for (int c = 0; c < channels; ++c)
    (warps.emplace_back([=] {
      HostMachine d(m->host);
      roles(d, c);
    }), ...);
  for (auto& warp : warps) warp.join();
  m->host.network.end();
  return m->failed();
}

}  // namespace

extern "C" {

// world: the windows of all ranks, one after the other, zero at first.
EpMachine* ep_open(const Shape* s, int rank, void* world, const EpOptions* o) {
  return new EpMachine(*s, Layout::make(*s), rank, static_cast<char*>(world), *o);
}
void ep_close(EpMachine* m) { delete m; }
void ep_stop(EpMachine* m) { HostMachine(m->host).fail(Failure{STOPPED, LAYOUT, 0, m->host.rank, m->host.rank, 0}, 0, 0); }
void ep_failure(EpMachine* m, int64_t* out) {
  const Failure f = Failure::unpack(*word_at(m->host.window(m->host.rank), m->host.layout.abort));
  const int64_t values[8] = {f.code, f.role, f.channel, f.rank, f.peer, f.argument,
                             (int64_t)m->host.failed_values[0], (int64_t)m->host.failed_values[1]};
  std::memcpy(out, values, sizeof values);
}
void ep_counters(EpMachine* m, uint64_t* out) { std::memcpy(out, m->host.counters, sizeof m->host.counters); }

int ep_notify(EpMachine* m, const EpTransfer* t, const int64_t* ids, int row_bytes, int format) {
  const Shape& s = m->host.shape;
  const Layout& l = m->host.layout;
  const Routing r = m->routing(*t);
  const NotifyArguments a{ids, {t->top_k, row_bytes, format, 0}, m->epoch++};
  HostMachine d(m->host);
  layout(d, s, r, a, 0, 1);
  const int status = run(
      m, 1, [&](HostMachine& w, int) { notify_send(w, s, l, r, a); },
      [&](HostMachine& w, int) { notify_forward(w, s, l, r, a); },
      [&](HostMachine& w, int) { notify_receive(w, s, l, r, a); });
  if (status == 0) tables(d, s, r);
  return status;
}

int ep_dispatch(EpMachine* m, const EpTransfer* t, const void* x, const void* weights, void* rows, void* row_weights,
                int row_bytes, int format) {
  const Shape& s = m->host.shape;
  const Layout& l = m->host.layout;
  const Progress& p = m->progress;
  const Routing r = m->routing(*t);
  const DispatchArguments a{static_cast<const char*>(x), static_cast<const uint32_t*>(weights),
                            static_cast<char*>(rows), static_cast<uint32_t*>(row_weights), row_bytes, format};
  return run(
      m, s.channels, [&](HostMachine& d, int c) { dispatch_send(d, s, l, p, r, a, c); },
      [&](HostMachine& d, int c) { dispatch_forward(d, s, l, p, r, a, c); },
      [&](HostMachine& d, int c) { dispatch_receive(d, s, l, p, r, a, c); });
}

int ep_combine(EpMachine* m, const EpTransfer* t, const void* rows, const void* row_weights, void* sum, void* weights,
               int dim, int format, int wire) {
  const Shape& s = m->host.shape;
  const Layout& l = m->host.layout;
  const Progress& p = m->progress;
  const Routing r = m->routing(*t);
  const CombineArguments a{static_cast<const char*>(rows), static_cast<const uint32_t*>(row_weights),
                           static_cast<char*>(sum), static_cast<uint32_t*>(weights), dim, format, wire};
  return run(
      m, s.channels, [&](HostMachine& d, int c) { combine_send(d, s, l, p, r, a, c); },
      [&](HostMachine& d, int c) { combine_forward(d, s, l, p, r, a, c); },
      [&](HostMachine& d, int c) { combine_receive(d, s, l, p, r, a, c); });
}
}
