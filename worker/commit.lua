-- One commit: outputs, changed state, counters and cursors, all or nothing.
--
-- Checks come first. Then XADD, HSET or SADD, which Redis refuses when it is out of memory: when the
-- first write is refused nothing is applied, and after it nothing is refused any more.
--
-- KEYS  meta, symbols, then output streams and state hashes, which ARGV names by their position
-- ARGV  epoch, expected cursors, new cursors, timestamp, source,
--       n outputs, n times (key, event type, payload, trace id, correlation id),
--       n states to forget, n times (key),
--       n symbols, n times (key, symbol, m cells, m times (cell, bytes)),
--       n fields of meta, n times (field, value)
-- Reply {'OK'}, {'DUP'} this very commit was applied before, {'FENCED', owner, epoch},
--       {'LOST'} meta is gone, {'BACK', epoch} meta is of an earlier owner, {'CONFLICT', cursors found}

local held = redis.call('HMGET', KEYS[1], 'epoch', 'cursors', 'owner')
if not held[1] or not held[2] then
  return {'LOST'}
end
if tonumber(held[1]) < tonumber(ARGV[1]) then
  return {'BACK', held[1]} -- Redis lost what it had: a promoted replica, a power cut
end
if held[1] ~= ARGV[1] then
  return {'FENCED', held[3] or '', held[1]}
end
if held[2] == ARGV[3] then
  return {'DUP'}
end
if held[2] ~= ARGV[2] then
  return {'CONFLICT', held[2]}
end

local at = 6
local function take()
  at = at + 1
  return ARGV[at - 1]
end

for _ = 1, tonumber(take()) do
  local key, event_type, payload, trace, correlation = take(), take(), take(), take(), take()
  redis.call('XADD', KEYS[tonumber(key)], '*', 'event_type', event_type, 'payload', payload,
    'trace_id', trace, 'correlation_id', correlation, 'timestamp', ARGV[4], 'source', ARGV[5])
end

for _ = 1, tonumber(take()) do
  redis.call('DEL', KEYS[tonumber(take())])
end

for _ = 1, tonumber(take()) do
  local key, symbol, n = KEYS[tonumber(take())], take(), 2 * tonumber(take())
  if redis.call('SADD', KEYS[2], symbol) == 1 then
    redis.call('HSET', KEYS[1], 'symbols', redis.call('SCARD', KEYS[2]))
    redis.call('DEL', key) -- cells left by a state that was lost do not belong to this one
  end
  redis.call('HSET', key, unpack(ARGV, at, at + n - 1))
  at = at + n
end

local n = 2 * tonumber(take())
if n > 0 then
  redis.call('HSET', KEYS[1], unpack(ARGV, at, at + n - 1))
end
redis.call('HSET', KEYS[1], 'cursors', ARGV[3])
return {'OK'}
