"""What Redis does for the limits: one Lua script per operation, each atomic, each harmless when it comes twice.

A caller's keys: `window` (sorted set: when a request was admitted), `leases` (sorted set: when a running request's
place is given up unless renewed), `sums` (tokens in each) and `budget` (the day's). A member is `id:tokens`, so the
tokens of what is removed are known. Times are microseconds of Redis's own clock: the gateways' do not matter.
"""

from __future__ import annotations

PREFIX = "corral:"

_COMMON = """
local W, L, S, B = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local day = math.floor(time[1] / 86400)
local WINDOW, KEPT, DAYS = 60000000, 180, 172800

local function tokens_of(member)
  return tonumber(string.match(member, ':(%d+)$'))
end

local function sum(field)
  return tonumber(redis.call('HGET', S, field) or 0)
end

local function add(field, tokens)
  if tokens ~= 0 then redis.call('HINCRBY', S, field, tokens) end
end

local function trim(zset, horizon, field)
  local gone = redis.call('ZRANGEBYSCORE', zset, '-inf', horizon)
  if #gone > 0 then
    local tokens = 0
    for _, member in ipairs(gone) do tokens = tokens + tokens_of(member) end
    redis.call('ZREMRANGEBYSCORE', zset, '-inf', horizon)
    add(field, -tokens)
  end
  local count = redis.call('ZCARD', zset)
  if count == 0 then redis.call('HDEL', S, field) end
  return count
end

local function used()
  if redis.call('HGET', B, 'day') == tostring(day) then return tonumber(redis.call('HGET', B, 'used') or 0) end
  return 0
end

local function charge(tokens)
  if redis.call('HGET', B, 'day') ~= tostring(day) then
    redis.call('DEL', B)
    redis.call('HSET', B, 'day', day)
  end
  redis.call('HINCRBY', B, 'used', tokens)
  redis.call('EXPIRE', B, DAYS)
end

local function remove(zset, field, member)
  local removed = redis.call('ZREM', zset, member)
  if removed == 1 then add(field, -tokens_of(member)) end
  return removed == 1
end

local function keep()
  for _, key in ipairs({W, L, S}) do redis.call('EXPIRE', key, KEPT) end
end
"""

# All or nothing. ARGV: id, limits (requests, tokens, concurrency, budget; 0 = none), tokens, lease (µs).
# Answers: kind (0 = admitted, else which limit, as `Limit`), wait (µs; -1 = never), requests and tokens in the window,
# µs until its oldest leaves, the day, tokens used on it.
RESERVE = (
    _COMMON
    + """
local id = ARGV[1]
local rpm, tpm, most, budget, tokens, lease =
  tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local requests, open = trim(W, now - WINDOW, 'window'), trim(L, now, 'leases')
local counted, spent, held = sum('window'), used(), sum('leases')

local function left_at(index)
  return tonumber(redis.call('ZRANGE', W, index, index, 'WITHSCORES')[2]) + WINDOW - now
end

local function answer(kind, wait)
  local reset = 0
  if requests > 0 then reset = left_at(0) end
  return {kind, wait, requests, counted, reset, day, spent}
end

local function until_free(needed)
  for start = 0, requests - 1, 100 do
    local chunk = redis.call('ZRANGE', W, start, start + 99, 'WITHSCORES')
    for i = 1, #chunk, 2 do
      needed = needed - tokens_of(chunk[i])
      if needed <= 0 then return tonumber(chunk[i + 1]) + WINDOW - now end
    end
  end
  return WINDOW
end

if budget > 0 and (spent >= budget or spent + tokens > budget) then
  return answer(4, ((day + 1) * 86400) * 1000000 - now)
end
local request_wait, token_wait = 0, 0
if rpm > 0 and requests >= rpm then request_wait = left_at(requests - rpm) end
if tpm > 0 and tokens > tpm then return answer(2, -1) end
if tpm > 0 and tokens > 0 and counted + tokens > tpm then token_wait = until_free(counted + tokens - tpm) end
if request_wait > 0 and request_wait >= token_wait then return answer(1, request_wait) end
if token_wait > 0 then return answer(2, token_wait) end
if most > 0 and open >= most then return answer(3, 1000000) end
if budget > 0 and (spent + held >= budget or spent + held + tokens > budget) then return answer(5, 1000000) end

if rpm > 0 or (tpm > 0 and tokens > 0) then
  local counts = 0
  if tpm > 0 then counts = tokens end
  if redis.call('ZADD', W, 'NX', now, id .. ':' .. string.format('%d', counts)) == 1 then
    add('window', counts)
    requests, counted = requests + 1, counted + counts
  end
end
if most > 0 or budget > 0 then
  local holds = 0
  if budget > 0 then holds = tokens end
  if redis.call('ZADD', L, now + lease, id .. ':' .. string.format('%d', holds)) == 1 then add('leases', holds) end
end
keep()
return answer(0, 0)
"""
)

# ARGV: member in the window, the same with what was really used, member in the leases, tokens to charge to the day's
# budget, 1 = charge them even if the lease is gone (0 = it may have been charged already).
# Answers: the day, tokens used.
SETTLE = (
    _COMMON
    + """
local at = redis.call('ZSCORE', W, ARGV[1])
if at and ARGV[1] ~= ARGV[2] then
  remove(W, 'window', ARGV[1])
  if redis.call('ZADD', W, at, ARGV[2]) == 1 then add('window', tokens_of(ARGV[2])) end
end
local held = remove(L, 'leases', ARGV[3])
local tokens = tonumber(ARGV[4])
if tokens > 0 and (held or ARGV[5] == '1') then charge(tokens) end
keep()
return {day, used()}
"""
)

# ARGV: member in the window, member in the leases. Answers: the day, tokens used.
REFUND = (
    _COMMON
    + """
remove(W, 'window', ARGV[1])
remove(L, 'leases', ARGV[2])
return {day, used()}
"""
)

# The heartbeat of a caller's leases, and what one gateway knows that Redis may have lost or never heard of.
# ARGV: lease (µs); the day and the tokens that Redis once said were used on it; gateway, number and tokens of a charge
# (0 = none; the same number never counts twice); how many leases, their members; then age (µs) and member of each
# admission. Answers: the day, tokens used.
RENEW = (
    _COMMON
    + """
local expiry = now + tonumber(ARGV[1])
local missing = tonumber(ARGV[3]) - used()
if ARGV[2] == tostring(day) and missing > 0 then charge(missing) end
local tokens = tonumber(ARGV[6])
if tokens > 0 and redis.call('HGET', B, ARGV[4]) ~= ARGV[5] then
  charge(tokens)
  redis.call('HSET', B, ARGV[4], ARGV[5])
end
trim(L, now, 'leases')
local last = 7 + tonumber(ARGV[7])
for i = 8, last do
  if redis.call('ZADD', L, expiry, ARGV[i]) == 1 then add('leases', tokens_of(ARGV[i])) end
end
for i = last + 1, #ARGV, 2 do
  if redis.call('ZADD', W, 'NX', now - tonumber(ARGV[i]), ARGV[i + 1]) == 1 then
    add('window', tokens_of(ARGV[i + 1]))
  end
end
keep()
return {day, used()}
"""
)

# KEYS: one sorted set of all gateways. ARGV: this one, lease (µs; 0 = it leaves). Answers: how many there are.
BEAT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if ARGV[2] == '0' then
  redis.call('ZREM', KEYS[1], ARGV[1])
else
  redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('EXPIRE', KEYS[1], 180)
return {redis.call('ZCARD', KEYS[1])}
"""

SCRIPTS = (RESERVE, SETTLE, REFUND, RENEW, BEAT)
GATEWAYS = (f"{PREFIX}{{gateways}}:beats",)


def keys_of(caller: str) -> tuple[str, str, str, str]:
    """All in one hash slot of a cluster."""
    base = f"{PREFIX}{{{caller}}}:"
    return base + "window", base + "leases", base + "sums", base + "budget"
