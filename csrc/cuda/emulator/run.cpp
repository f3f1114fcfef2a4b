// Fibers by ucontext for their stacks and setjmp for their switches, which then make no system calls.
#include "run.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

#include "device.h"

namespace alignvec::emulator {
namespace {

constexpr int kStack = 1 << 17;
constexpr int kGuard = 4096;  // bytes behind shared memory that nothing may write

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null for zeros
};

struct Fiber {
  std::vector<unsigned char> stack = std::vector<unsigned char>(kStack);
  jmp_buf state;
  bool started, done;
  std::deque<std::vector<Copy>> groups;  // the last one is open
};

struct Warp {
  unsigned char mine[32 * kExchanged], all[32 * kExchanged];
  int arrived, turn;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  unsigned char* memory;
  const std::function<void()>* kernel;
  jmp_buf scheduler;
  ucontext_t home;
  int running, threads, block, shared_bytes, arrived, turn;
  bool moved;  // some thread got further
};

Machine machine;

Fiber& fiber() { return machine.fibers[machine.running]; }

void wait_while(const int& turn, int old) {
  while (turn == old)
    if (!_setjmp(fiber().state)) _longjmp(machine.scheduler, 1);
  machine.moved = true;
}

void start() {
  (*machine.kernel)();
  fiber().done = machine.moved = true;
  _longjmp(machine.scheduler, 1);
}

void resume(Fiber& next) {
  if (_setjmp(machine.scheduler)) return;
  if (next.started) _longjmp(next.state, 1);
  next.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = next.stack.data();
  context.uc_stack.ss_size = next.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
  setcontext(&context);
}

void run_block(int block, bool backwards) {
  machine.block = block;
  machine.arrived = machine.turn = 0;
  std::memset(machine.memory, 0xFF, machine.shared_bytes + kGuard);
  for (Warp& warp : machine.warps) warp.arrived = warp.turn = 0;
  for (Fiber& each : machine.fibers) {
    each.started = each.done = false;
    each.groups.assign(1, {});
  }
  // A warp runs until all its threads wait for other warps: no two are ever at the same place by chance.
  const int warps = machine.threads / 32;
  for (bool any = true; any;) {
    any = false;
    bool stuck = true;
    for (int w = 0; w < warps; ++w) {
      do {
        machine.moved = false;
        for (int i = 0; i < 32; ++i) {
          const int thread = w * 32 + i;
          machine.running = backwards ? machine.threads - 1 - thread : thread;
          if (fiber().done) continue;
          any = true;
          resume(fiber());
        }
        stuck = stuck && !machine.moved;
      } while (machine.moved);
    }
    if (any && stuck) {
      std::fprintf(stderr, "emulator: threads of block %d wait for ones that never come\n", block);
      std::abort();
    }
  }
  for (int i = 0; i < kGuard; ++i)
    if (machine.memory[machine.shared_bytes + i] != 0xFF) {
      std::fprintf(stderr, "emulator: block %d wrote behind its shared memory\n", block);
      std::abort();
    }
}

}  // namespace

int thread_index() { return machine.running; }
int block_threads() { return machine.threads; }
int block_index() { return machine.block; }
unsigned char* shared_memory() { return machine.memory; }

void block_barrier() {
  const int turn = machine.turn;
  if (++machine.arrived < machine.threads) return wait_while(machine.turn, turn);
  machine.arrived = 0;
  ++machine.turn;
  machine.moved = true;
}

const unsigned char* exchange(const void* mine, int size) {
  Warp& warp = machine.warps[machine.running / 32];
  std::memcpy(warp.mine + machine.running % 32 * kExchanged, mine, size);
  const int turn = warp.turn;
  if (++warp.arrived < 32) {
    wait_while(warp.turn, turn);
  } else {
    std::memcpy(warp.all, warp.mine, sizeof warp.all);
    warp.arrived = 0;
    ++warp.turn;
    machine.moved = true;
  }
  return warp.all;
}

void copy_16(void* shared, const void* global, bool there) {
  auto* to = static_cast<unsigned char*>(shared);
  const bool inside = to >= machine.memory && to + 16 <= machine.memory + machine.shared_bytes;
  const auto address = reinterpret_cast<uintptr_t>(shared) | (there ? reinterpret_cast<uintptr_t>(global) : 0);
  if (!inside || address % 16) {
    std::fprintf(stderr, "emulator: a copy %s\n", inside ? "that is not aligned" : "outside of shared memory");
    std::abort();
  }
  std::memset(to, 0xFF, 16);
  fiber().groups.back().push_back({to, there ? static_cast<const unsigned char*>(global) : nullptr});
}

void copy_commit() { fiber().groups.emplace_back(); }

void copy_wait(int pending) {
  auto& groups = fiber().groups;
  for (; static_cast<int>(groups.size()) - 1 > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
}

void run(int blocks, int threads, int shared, bool backwards, const std::function<void()>& kernel) {
  machine.threads = threads;
  machine.kernel = &kernel;
  if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.resize(threads);
  machine.warps.resize((threads + 31) / 32);
  machine.shared_bytes = shared;
  machine.shared.resize(shared + kGuard + 16);
  machine.memory = machine.shared.data() + (16 - reinterpret_cast<uintptr_t>(machine.shared.data()) % 16) % 16;
  for (int block = 0; block < blocks; ++block) run_block(block, backwards);
}

}  // namespace alignvec::emulator
