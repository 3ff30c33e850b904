// The threads of a parallel region: the barrier at which they wait for each other, and how work is shared among them.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#include <sched.h>
#include "simd.h"

// How much of one thread's share was taken in a phase: (phase, from the back, from the front) in 24, 20 and 20 bits.
struct Claim { alignas(64) uint64_t word; };
struct Meeting { alignas(64) int32_t arrived; alignas(64) int32_t phase; };
struct Team { int thread, threads; Meeting* meeting; Claim* claims; };

template <class Work> static void in_parallel(int64_t threads, Work work) {
  Meeting meeting = {0, 1};
  Claim claims[threads];
  memset(claims, 0, sizeof claims);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  work(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting, claims});
#else
  work(Team{0, 1, &meeting, claims});
#endif
}

// Ends a phase: all threads wait for each other. In OpenMP's own barrier a thread sleeps until it is woken. Here it spins for
// some 20 microseconds and then yields, because the thread that it waits for may need this processor. Beside another busy
// process, sleeping (futex) took 1.4 times as long as this, and spinning without yielding took just as long.
static void barrier(Team us) {
  enum { SPINS = 1000 };
  const int32_t phase = __atomic_load_n(&us.meeting->phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&us.meeting->arrived, 1, __ATOMIC_ACQ_REL) == us.threads) {
    __atomic_store_n(&us.meeting->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&us.meeting->phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int i = 0; __atomic_load_n(&us.meeting->phase, __ATOMIC_ACQUIRE) == phase; i += i < SPINS) {
    if (i == SPINS) sched_yield();
#if defined(__x86_64__)
    else _mm_pause();
#else
    else __asm__ volatile("isb");
#endif
  }
}

// Takes the next of the n tasks of this phase, or -1 when none is left. A phase has one set of tasks. A thread first takes its
// own share, from the front. Then it helps threads that may have lost their processor: it takes from the back of their shares.
static int64_t take(Team us, int64_t n) {
  const uint64_t phase = (uint64_t)__atomic_load_n(&us.meeting->phase, __ATOMIC_RELAXED), mask = (1 << 20) - 1;
  for (int i = 0; i < us.threads; ++i) {
    const int of = (us.thread + i) % us.threads;
    const Share all = share(n, of, us.threads);
    uint64_t* word = &us.claims[of].word;
    for (uint64_t was = __atomic_load_n(word, __ATOMIC_RELAXED);;) {
      const uint64_t now = was >> 40 == phase ? was : phase << 40;  // a word of an older phase: nothing is taken yet
      const int64_t front = all.first + (int64_t)(now & mask), back = all.last - 1 - (int64_t)(now >> 20 & mask);
      if (front > back) break;
      const uint64_t then = now + (i == 0 ? 1 : mask + 1);
      if (__atomic_compare_exchange_n(word, &was, then, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return i == 0 ? front : back;
    }
  }
  return -1;
}
