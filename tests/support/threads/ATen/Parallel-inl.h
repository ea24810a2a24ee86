// at::parallel_for for ThreadSanitizer, in place of torch's: it divides every range among four threads of the C++ library, however small it is. Torch's own
// threads are those of OpenMP, whose library tells the sanitizer nothing of how they wait for one another, so that all they share would be reported.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include <c10/util/ParallelGuard.h>

namespace at {

template <class F>
inline void parallel_for(const int64_t begin, const int64_t end, const int64_t, const F& f) {
  if (begin >= end) return;
  if (at::in_parallel_region()) return f(begin, end);
  const int64_t each = (end - begin + 3) / 4, pieces = (end - begin + each - 1) / each;
  std::vector<std::exception_ptr> errors(pieces);
  std::vector<std::thread> threads;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    threads.emplace_back([&, piece] {
      internal::ThreadIdGuard number(static_cast<int>(piece));
      c10::ParallelGuard guard(true);
      try {
        f(begin + piece * each, std::min(end, begin + (piece + 1) * each));
      } catch (...) {
        errors[piece] = std::current_exception();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace at
