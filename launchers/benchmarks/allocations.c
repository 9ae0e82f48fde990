// Counts what torch allocates on the host: every block of posix_memalign, which its tensors come from.
// Preloaded into a process, it says bytes alive now, and the most since the last reset, of all threads.
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *pointer);

#define SLOTS (1u << 20)  // a power of two, far above the number of tensors alive
static struct { uintptr_t pointer; size_t size; } table[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t alive, peak;

size_t allocations_alive(void) { return alive; }
size_t allocations_peak(void) { return peak; }
void allocations_reset(void) { peak = alive; }

static uint32_t home(uintptr_t pointer) { return (uint32_t)((pointer >> 6) * 2654435761u) & (SLOTS - 1); }

int posix_memalign(void **result, size_t alignment, size_t size) {
    void *pointer = __libc_memalign(alignment, size);
    if (!pointer) return ENOMEM;
    *result = pointer;
    pthread_mutex_lock(&lock);
    uint32_t slot = home((uintptr_t)pointer);
    while (table[slot].pointer) slot = (slot + 1) & (SLOTS - 1);
    table[slot].pointer = (uintptr_t)pointer;
    table[slot].size = size;
    alive += size;
    if (alive > peak) peak = alive;
    pthread_mutex_unlock(&lock);
    return 0;
}

static void forget(uint32_t slot) {  // and close the gap, so that searches may end at the first empty slot
    uint32_t next = slot;
    for (;;) {
        next = (next + 1) & (SLOTS - 1);
        if (!table[next].pointer) break;
        uint32_t ideal = home(table[next].pointer);
        if (((next - ideal) & (SLOTS - 1)) >= ((next - slot) & (SLOTS - 1))) {
            table[slot] = table[next];
            slot = next;
        }
    }
    table[slot].pointer = 0;
}

void free(void *pointer) {
    if (pointer && !((uintptr_t)pointer & 63)) {
        pthread_mutex_lock(&lock);
        for (uint32_t slot = home((uintptr_t)pointer); table[slot].pointer; slot = (slot + 1) & (SLOTS - 1))
            if (table[slot].pointer == (uintptr_t)pointer) {
                alive -= table[slot].size;
                forget(slot);
                break;
            }
        pthread_mutex_unlock(&lock);
    }
    __libc_free(pointer);
}
