/** The service at one moment, in one form, whatever a key may see of it. */

/** A snapshot of /metrics/stream. */
export function fromSnapshot(told) {
  const { requests, tokens, time_to_first_token_ms: first } = told;
  return {
    at: told.timestamp,
    running: Math.max(0, requests.active - requests.waiting),
    waiting: requests.waiting,
    total: requests.total,
    failed: requests.failed,
    requestsPerSecond: requests.per_second,
    tokensPerSecond: tokens.out_per_second,
    first: { count: first.count, p50: first.p50, p95: first.p95 },
    watchers: told.watchers ?? 1,
    places: places(told.models, "capacity"),
    models: new Map(
      Object.entries(told.models).map(([id, row]) => [
        id,
        { active: row.active, waiting: row.waiting, places: row.capacity, tokensPerSecond: row.tokens_out_per_second },
      ]),
    ),
  };
}

/** /v1/queue/stats, for keys without the scope admin: no tokens, and no times. */
export function fromQueues({ summary, per_model: perModel }) {
  return {
    at: Date.now() / 1000,
    running: summary.total_processing,
    waiting: summary.total_queued,
    total: summary.total_processed,
    failed: null,
    requestsPerSecond: null,
    tokensPerSecond: null,
    first: null,
    places: places(perModel, "max_concurrent"),
    models: new Map(
      Object.entries(perModel).map(([id, row]) => [
        id,
        { active: row.processing, waiting: row.queued, places: row.max_concurrent, tokensPerSecond: null },
      ]),
    ),
  };
}

function places(rows, name) {
  return Object.values(rows).reduce((sum, row) => sum + (row[name] ?? 0), 0);
}
