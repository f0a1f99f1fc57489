// How work is cut into tasks and tiles.
// Included inside namespace effops::<isa>::{anonymous}; see kernels.inl.

// One slot for each thread that is worth waking. `cost` is in FMA registers, about one cycle each. Slots own partial
// sums: what a slot adds up depends on their number (so on the number of threads) and not on which thread runs it.
inline index_t slots_for(double cost, index_t units) {
  constexpr double kGrain = 20000;  // below ~6 us a second thread costs more than it brings
  const index_t worth = static_cast<index_t>(cost / kGrain);
  return imax(1, imin(imin(thread_count(), worth), units));
}

// For work without partial sums: a few shares for each slot, taken by the threads as they come, so that one which the
// system holds up does not hold up the others.
inline index_t shares_for(double cost, index_t units) {
  const index_t slots = slots_for(cost, units);
  return slots == 1 ? 1 : imin(units, 4 * slots);
}

template <class F>
inline void run_tasks(index_t count, const F& body) {
  parallel_tasks(count, [](void* context, index_t i) { (*static_cast<const F*>(context))(i); }, const_cast<F*>(&body));
}

// Pixels a task works on at a time: a tile of `bytes_per_pixel` stays in L2 and most of it in L1. Whole rows where they
// fit.
inline index_t tile_pixels(index_t bytes_per_pixel, index_t row) {
  constexpr index_t kTileBytes = 96 * 1024;
  const index_t pixels = imax(28, imin(280, kTileBytes / imax(1, bytes_per_pixel)));
  return row <= pixels ? pixels / row * row : pixels / 28 * 28;
}

// A zeroed block of `size` values for each slot.
template <class C>
C* partial_sums(Arena& arena, index_t slots, index_t size) {
  C* sums = static_cast<C*>(arena.allocate(slots * size * sizeof(C)));
  __builtin_memset(sums, 0, slots * size * sizeof(C));
  return sums;
}

// Adds the slots in order into the first one.
template <class C>
void reduce_slots(C* sums, index_t slots, index_t size) {
  for (index_t s = 1; s < slots; ++s) {
    for (index_t i = 0; i < size; ++i) sums[i] += sums[s * size + i];
  }
}
