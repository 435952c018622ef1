-- Keep our own streams bounded. What the collector has stored may go; what it has not goes only
-- beyond the hard cap, and is counted. One call removes at most ARGV[2] entries of a stream, so
-- that it never holds the server for long.
--
-- KEYS  meta, collected, then our streams
-- ARGV  epoch, limit, cursors as we left them, then per stream (name for the counter, newest entries
--       to keep, hard cap)
-- Reply {'OK', uncollected entries dropped}, {'FENCED', owner, epoch}, {'BACK', epoch}, {'LOST'}, or
--       {'CONFLICT', cursors found}: commits of this epoch are gone, which no commit may find for long

local held = redis.call('HMGET', KEYS[1], 'epoch', 'owner', 'cursors')
if not held[1] or not held[3] then
  return {'LOST'}
end
if tonumber(held[1]) < tonumber(ARGV[1]) then
  return {'BACK', held[1]} -- Redis lost what it had: a promoted replica, a power cut
end
if held[1] ~= ARGV[1] then
  return {'FENCED', held[2] or '', held[1]}
end
if held[3] ~= ARGV[3] then
  return {'CONFLICT', held[3]}
end
local limit = tonumber(ARGV[2])
local dropped = 0

for i = 3, #KEYS do
  local key = KEYS[i]
  local name, keep, cap = unpack(ARGV, 3 * i - 5, 3 * i - 3)
  local length = redis.call('XLEN', key)
  local durable = redis.call('HGET', KEYS[2], key)
  local spare = math.min(length - tonumber(keep), limit)
  if durable and spare > 0 then
    length = length - redis.call('XTRIM', key, 'MINID', '~', durable, 'LIMIT', spare)
  end
  local excess = math.min(length - tonumber(cap), limit)
  if excess > 0 then
    -- whole nodes go; the first may begin with entries that were collected
    local stored = 0
    if durable then
      stored = #redis.call('XRANGE', key, '-', durable, 'COUNT', excess)
    end
    local lost = redis.call('XTRIM', key, 'MAXLEN', '~', cap, 'LIMIT', excess) - stored
    if lost > 0 then
      redis.call('HINCRBY', KEYS[1], 'dropped:' .. name, lost)
      dropped = dropped + lost
    end
  end
end
return {'OK', dropped}
