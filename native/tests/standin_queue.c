#include "standin_queue.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_STREAMS = 16 };

static struct queue {
    CUstream stream;
    struct operation *first, *last;
    size_t queued, done;
} queues[MOST_STREAMS];
static size_t queue_count;

static struct queue *find_queue(CUstream stream)
{
    for (size_t i = 0; i < queue_count; i++)
        if (queues[i].stream == stream)
            return &queues[i];
    if (queue_count == MOST_STREAMS) {
        fault("more than %d streams", MOST_STREAMS);
        return &queues[0];
    }
    queues[queue_count].stream = stream;
    return &queues[queue_count++];
}

CUresult enqueue(CUstream stream, const struct operation *operation)
{
    struct queue *queue = find_queue(stream);
    struct operation *copy = malloc(sizeof *copy);
    if (copy == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *copy = *operation;
    copy->next = NULL;
    if (queue->last != NULL)
        queue->last->next = copy;
    else
        queue->first = copy;
    queue->last = copy;
    queue->queued++;
    return CUDA_SUCCESS;
}

static void run(const struct operation *operation)
{
    if (operation->kind == WAIT) {
        run_stream(operation->stream, operation->count);
        return;
    }
    if (operation->kind == LAUNCH) {
        run_kernel(&operation->launch);
        return;
    }
    void *to = at_device(operation->to, operation->bytes);
    const void *from = operation->host;
    if (operation->kind == COPY_ON_DEVICE)
        from = at_device(operation->from, operation->bytes);
    if (to != NULL && operation->kind == FILL)
        memset(to, operation->byte, operation->bytes);
    else if (to != NULL && from != NULL)
        memcpy(to, from, operation->bytes);
}

size_t queued(CUstream stream)
{
    return find_queue(stream)->queued;
}

void run_stream(CUstream stream, size_t count)
{
    struct queue *queue = find_queue(stream);
    while (queue->done < count && queue->first != NULL) {
        struct operation *operation = queue->first;
        queue->first = operation->next;
        if (queue->first == NULL)
            queue->last = NULL;
        queue->done++;
        run(operation);
        free(operation->taken);
        free(operation);
    }
}

void run_everything(void)
{
    /* Later streams first: what must come first has to say so by an event. */
    for (size_t i = queue_count; i > 0; i--)
        run_stream(queues[i - 1].stream, queues[i - 1].queued);
}
