-- One commit: outputs, changed state, counters and cursors, all or nothing.
--
-- Checks come first. Then XADD, HSET or SADD, which Redis refuses when it is out of memory: when the
-- first write is refused nothing is applied, and after it nothing is refused any more.
--
-- KEYS  meta, symbols, then output streams and state hashes, which the body names by their position
-- ARGV  epoch, expected cursors, new cursors, timestamp, source, body in msgpack, and the payloads of
--       the outputs one by one, since Lua reads every byte of every string that it is given:
--       {positions of output streams by event type,
--        {event type, trace id, correlation id of an output, of the next ...},
--        {positions of states to forget},
--        {position, symbol of a state that is new, of the next ...},
--        {position of a state, n, cell, bytes, cell, bytes ... (n of these), the next ...},
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

for i = 7, #ARGV do
  local at = 3 * (i - 7)
  redis.call('XADD', KEYS[places[outputs[at + 1]]], '*', 'event_type', outputs[at + 1],
    'payload', ARGV[i], 'trace_id', outputs[at + 2], 'correlation_id', outputs[at + 3],
    'timestamp', ARGV[4], 'source', ARGV[5])
end

for _, place in ipairs(forgotten) do
  redis.call('DEL', KEYS[place])
end

for at = 1, #added, 2 do
  -- counted here, not by the set: should the set vanish, the number still says so at the next start
  redis.call('HINCRBY', KEYS[1], 'symbols', redis.call('SADD', KEYS[2], added[at + 1]))
  redis.call('DEL', KEYS[added[at]]) -- cells left by a state that was lost are not this one's
end

local at = 1
while at < #states do
  local last = at + 1 + states[at + 1]
  redis.call('HSET', KEYS[states[at]], unpack(states, at + 2, last))
  at = last + 1
end

if #fields > 0 then
  redis.call('HSET', KEYS[1], unpack(fields))
end
redis.call('HSET', KEYS[1], 'cursors', ARGV[3])
return {'OK'}
