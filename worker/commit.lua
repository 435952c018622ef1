-- One commit: outputs, changed state, counters and cursors, all or nothing.
--
-- Checks come first. Then XADD, HSET or SADD, which Redis refuses when it is out of memory: when the
-- first write is refused nothing is applied, and after it nothing is refused any more.
--
-- KEYS  meta, symbols, then output streams and state hashes, which the body names by their position
-- ARGV  epoch, expected cursors, new cursors, timestamp, source, body in msgpack, and the payloads of
--       the outputs one by one, since Lua reads every byte of every string that it is given:
--       {positions of output streams by event type,
--        {{event type, trace id, correlation id} ...},
--        {positions of states to forget},
--        {{position of a state, symbol} of those that have none yet ...},
--        {{position of a state, {cell, bytes, cell, bytes ...}} ...},
--        {field of meta, value, field, value ...}}
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

local places, outputs, forgotten, added, states, fields = unpack(cmsgpack.unpack(ARGV[6]))

for i, output in ipairs(outputs) do
  redis.call('XADD', KEYS[places[output[1]]], '*', 'event_type', output[1], 'payload', ARGV[6 + i],
    'trace_id', output[2], 'correlation_id', output[3], 'timestamp', ARGV[4], 'source', ARGV[5])
end

for _, place in ipairs(forgotten) do
  redis.call('DEL', KEYS[place])
end

for _, state in ipairs(added) do
  redis.call('SADD', KEYS[2], state[2])
  redis.call('HSET', KEYS[1], 'symbols', redis.call('SCARD', KEYS[2]))
  redis.call('DEL', KEYS[state[1]]) -- cells left by a state that was lost are not this one's
end

for _, state in ipairs(states) do
  redis.call('HSET', KEYS[state[1]], unpack(state[2]))
end

if #fields > 0 then
  redis.call('HSET', KEYS[1], unpack(fields))
end
redis.call('HSET', KEYS[1], 'cursors', ARGV[3])
return {'OK'}
