// The network of a rank on a CPU: a thread that carries out puts and signals late, and out of order where a real one may.
//
// Rules (NCCL's GIN): puts are unordered among themselves; a strong signal takes effect after every earlier put of its
// queue to the same peer; a weak signal whenever; queues are independent of each other. With a seed of 0 it is orderly.
#pragma once
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include <sched.h>
#include <time.h>

#include "shape.h"

namespace ep {

inline void nap(int spins) {
  if (spins < 16) {
    sched_yield();
    return;
  }
  const int doublings = spins - 16 < 6 ? spins - 16 : 6;
  const timespec time{0, 16000L << doublings};  // 16 us to 1 ms
  nanosleep(&time, nullptr);
}

inline uint64_t* word_at(char* window, size_t offset) { return reinterpret_cast<uint64_t*>(window + offset); }

struct Operation {
  enum Kind : int { PUT, STRONG_SIGNAL, WEAK_SIGNAL } kind;
  int peer;  // world rank
  size_t target, source, bytes;
  uint64_t value;
};

// ThreadSanitizer must not take the hand-over of a descriptor for an ordering of the data it describes: the lock and the
// array are hidden from it. What orders the data is the doorbell, rung by the kernel's own release site.
#define EP_HIDDEN __attribute__((no_sanitize("thread"), noinline))

class Queue {
 public:
  EP_HIDDEN bool push(const Operation& op) {
    lock();
    const bool fits = tail_ - head_ < CAPACITY;
    if (fits) copy(ring_[tail_++ % CAPACITY], op);
    unlock();
    return fits;
  }
  EP_HIDDEN bool pop(Operation& op) {
    lock();
    const bool some = head_ != tail_;
    if (some) copy(op, ring_[head_++ % CAPACITY]);
    unlock();
    return some;
  }
  EP_HIDDEN bool empty() {
    lock();
    const bool none = head_ == tail_;
    unlock();
    return none;
  }
  // Before push, with the release site of the caller; after pop.
  template <int SITE>
  void ring() { __atomic_fetch_add(&bell_, 1, ordered<SITE>() ? __ATOMIC_RELEASE : __ATOMIC_RELAXED); }
  void hear() { __atomic_load_n(&bell_, __ATOMIC_ACQUIRE); }

 private:
  static constexpr uint64_t CAPACITY = 1024;
  EP_HIDDEN static void copy(Operation& to, const Operation& from) {
    to.kind = from.kind, to.peer = from.peer, to.target = from.target, to.source = from.source;
    to.bytes = from.bytes, to.value = from.value;
  }
  EP_HIDDEN void lock() {
    while (__atomic_exchange_n(&locked_, 1, __ATOMIC_ACQUIRE)) sched_yield();
  }
  EP_HIDDEN void unlock() { __atomic_store_n(&locked_, 0, __ATOMIC_RELEASE); }
  Operation ring_[CAPACITY];
  uint64_t head_ = 0, tail_ = 0, bell_ = 0;
  int locked_ = 0;
};

class Network {
 public:
  // dead_after: operations after which it does nothing any more (0: never), for tests of time-outs.
  Network(char* world, size_t window_bytes, int rank, int num_queues, uint64_t seed, uint64_t dead_after)
      : world_(world), window_bytes_(window_bytes), rank_(rank), queues_(num_queues), held_(num_queues),
        random_(seed * 1000003 + rank), faulty_(seed != 0), dead_after_(dead_after), thread_([this] { run(); }) {}
  ~Network() {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      closing_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }
  void begin() {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      ++kernels_, ++begun_;
    }
    wake_.notify_one();
  }
  void end() {
    const std::lock_guard<std::mutex> guard(mutex_);
    --kernels_;
  }
  template <int SITE>
  void post(int queue, const Operation& op) {
    queues_[queue].template ring<SITE>();
    while (!queues_[queue].push(op)) nap(0);
  }

 private:
  void run() {
    for (int idle = 0;;) {
      bool busy = false;
      for (size_t i = 0; i < queues_.size(); ++i) {
        const size_t q = faulty_ ? random_() % queues_.size() : i;
        busy |= serve(q);
      }
      for (const auto& held : held_) busy |= !held.empty();
      idle = busy ? 0 : idle + 1;
      if (idle <= 32) {
        if (idle != 0 || faulty_) sched_yield();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      if (kernels_ != 0) {
        lock.unlock();
        nap(idle - 16);
      } else if (all_empty()) {  // asked after the last kernel ended, so nothing is posted unseen
        if (closing_) return;
        // A kernel may post, end and leave everything to this thread before it wakes: what counts is that one began.
        wake_.wait(lock, [this, seen = begun_] { return begun_ != seen || closing_; });
        idle = 0;
      }
    }
  }

  bool all_empty() {
    for (auto& queue : queues_)
      if (!queue.empty()) return false;
    return true;
  }

  bool serve(size_t q) {
    auto& held = held_[q];
    Operation op;
    bool any = false;
    while (held.size() < 64 && queues_[q].pop(op)) {
      queues_[q].hear();
      any = true;
      if (dead_after_ == 0 || served_++ < dead_after_) hold(held, op);
    }
    if (!faulty_) {
      for (const auto& next : held) apply(next);
      held.clear();
      return any;
    }
    for (size_t tries = held.size() == 0 ? 0 : random_() % (held.size() + 1); tries > 0 && !held.empty(); --tries) {
      const size_t i = random_() % held.size();
      if (!may_go(held, i)) continue;
      apply(held[i]);
      held.erase(held.begin() + (ptrdiff_t)i);
      any = true;
    }
    return any;
  }

  // A put arrives in two pieces, so that a reader that comes too early sees half of it.
  void hold(std::vector<Operation>& held, const Operation& op) {
    held.push_back(op);
    if (!faulty_ || op.kind != Operation::PUT || op.bytes < 32) return;
    const size_t first = op.bytes / 32 * 16;
    held.back().bytes = first;
    held.push_back(op);
    held.back().target += first, held.back().source += first, held.back().bytes -= first;
  }

  static bool may_go(const std::vector<Operation>& held, size_t i) {
    if (held[i].kind != Operation::STRONG_SIGNAL) return true;
    for (size_t j = 0; j < i; ++j)
      if (held[j].kind == Operation::PUT && held[j].peer == held[i].peer) return false;
    return true;
  }

  void apply(const Operation& op) {
    char* peer = world_ + (size_t)op.peer * window_bytes_;
    if (op.kind == Operation::PUT) std::memcpy(peer + op.target, world_ + (size_t)rank_ * window_bytes_ + op.source, op.bytes);
    else __atomic_fetch_add(word_at(peer, op.target), op.value, __ATOMIC_RELEASE);
  }

  char* world_;
  size_t window_bytes_;
  int rank_;
  std::vector<Queue> queues_;
  std::vector<std::vector<Operation>> held_;
  std::mt19937_64 random_;
  bool faulty_;
  uint64_t dead_after_, served_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
  int kernels_ = 0;
  uint64_t begun_ = 0;
  bool closing_ = false;
  std::thread thread_;  // last: starts when the rest is there
};

}  // namespace ep
