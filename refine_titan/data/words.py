"""Words for the keys of needles and for word lists. No word is part of another, so that a word found in a response is that word."""

ADJECTIVES = """
abrupt absent absurd active acute adept ajar alert alien aloof ample ancient angular antique anxious arctic ardent arid artful
ashen astute atomic august austere avid awkward azure balmy barren bashful bitter bland bleak blissful blunt bold brash brave
brazen breezy brief bright brisk brittle broad bronze bulky bumpy burly busy calm candid careful casual cautious charming
cheerful cheery chilly choosy chubby civil clean clear clever cloudy clumsy coarse coastal cobalt cold colossal comic compact
concise copper coral corny cosmic costly cozy cranky crimson crisp crooked cruel crunchy cryptic curious curly curved cyan
daily dainty damp daring dark dashing dazzling deaf dear decent deep deft dense devout dim dire discreet distant divine dizzy
docile dogged domestic dormant dotted doubtful drab drafty dreamy drowsy dual dubious dull dusky dusty dutiful earnest earthy
eastern ebony eerie elastic elated elderly elegant elfin eminent empty endless enormous equal erratic eternal ethical evident
exact exotic expert extinct fabled faint fair faithful famous fancy fast fearless feeble feisty fertile fervent festive fickle
fierce fiery filmy fiscal flaky flashy flat fleet flimsy floral fluent fluffy fluid foamy focal foggy fond foolish forlorn
formal fragile frail frank frantic free fresh frigid frisky frosty frozen frugal fruity full funny furry fussy fuzzy gallant
gaudy gaunt generous gentle genuine ghostly giant giddy gifted glassy gleaming global gloomy glossy golden graceful gracious
grand grassy grateful greedy gritty groggy gross grumpy guilty gusty handy happy hardy harsh hasty hazy heady healthy hearty
heavy hefty helpful hidden hoarse hollow homely honest hopeful horrid hostile huge humble humid hungry hushed husky ideal idle
immense inborn indigo inert infinite inland intense inward ironic itchy ivory jaded jagged jaunty jolly jovial joyful joyous
jubilant juicy jumbo junior keen kind knotty lanky large lavish lawful lazy leafy legal lethal level likely limber limp linear
liquid lively livid local lofty lonely lovely loyal lucid lunar lusty magenta magic majestic mammoth marine maroon massive
mature meager mean meek mellow merry messy mighty mild minor minty misty modern modest moist moody mossy muddy mundane murky
musical muted mutual narrow nasal nasty native naval neat nervous neutral nimble noble nocturnal noisy normal northern notable
numb oaken obedient oblong obscure odd oily olive opaque optimal orange ordinary organic ornate outer oval overt pale paltry
parched pastel patient peaceful perky petite placid plain playful pleasant plucky plump plush poetic pointed polar polite
pompous poor portly posh potent precious precise prickly primal prime private prompt proper proud prudent puffy puny pure
purple quaint queasy quick quiet quirky radiant radical ragged rainy rapid rare raspy ready recent reckless regal remote ripe
robust rocky roomy rosy rotten rotund rough round rowdy royal rubbery ruby rugged rural russet rustic ruthless sacred saline
salty sandy sane sassy saucy savage savory scaly scant scarce scarlet scary scenic secure sedate senior serene serious severe
shabby shadowy shady shaggy shallow sharp sheer shiny short shrewd shrill silent silken silly silver simple sincere skeletal
sleek sleepy slender slick slight slimy sloppy slow sly small smart smoky smooth smug snappy sneaky snowy snug sober social
soft solar solemn solid sonic sooty sordid southern spare sparse spicy spiky spiral splendid spotless spotted spry square
squeaky stale stark starry stately steady sterile sticky stiff still stoic stormy stout strange strict strong stubborn sturdy
subtle sudden sugary sullen sultry sunny superb supple surly sweet swift tacit tame tangy tardy tart tasty tawny teal tedious
tender tepid terse thin thirsty thorny thrifty tidal tidy timid tiny tired tough toxic tranquil tricky trim trivial tropical
trusty twin typical ultra unique upbeat uptight urgent useful usual vacant vague valiant valid vapid vast velvet verbal
verdant vibrant vicious vigilant violet viral vital vivid vocal volatile wacky warm wary wasteful watery wavy waxen weak
wealthy weary weekly weird western whole wicked wide wild wily windy winged wiry wise wistful witty woeful wooden woolly
worldly worn worthy wry yearly yellow young zany zealous zesty
""".split()

NOUNS = """
abbey abdomen accent acorn adapter admiral adobe agenda aisle alarm album alcove alder algae alloy almanac almond alphabet
altar amulet anchor anchovy ankle anthem antler anvil apple apricot apron aqueduct arcade archer archive armor artist atlas
auction author avenue awning axis axle bachelor badger bagel baker balcony ballad balloon ballot bamboo banana bandage banjo
banker banner banquet barge barley barn barrel basalt basin basket bassoon bathtub baton battery bayou beach beacon beaker
beam bear beaver bedrock beetle bellows bench beret bicycle biscuit bishop bison blanket blazer blender blossom blouse bluff
bobcat bolt bonfire bonnet bookcase border bottle boulder bouquet bowl bracelet bracket brain branch bread brick bridge broker
brook broom brother bubble bucket buckle budget buffalo bugle builder bulb bundle bunker buoy bureau burrow bushel butcher
butler butter button buzzard cabbage cabinet cable cactus cadet cafe cake calendar camel camera canal canary candle cannon
canoe canopy canteen canvas canyon cape capital captain caramel caravan cardinal cargo carnival carpet carriage carrot cascade
cashew casino castle cattle cauldron causeway cavern cedar ceiling cellar cello cement census ceramic cereal chain chair chalk
chamber channel chapel chapter chariot charter chasm cherry chestnut chicken chimney chisel chord church cider cinema cipher
circle circus citadel citizen clamp clarinet clay cleric cliff climate clinic cloak clock closet cloth clover coach cobbler
cobra cocoa coconut coffee coin collar colony column comet comma compass concert condor cone copy cork corner corridor costume
cottage cotton couch cougar council counter county couple courier cousin cowbell coyote crab cradle crane crater crayon
creature creek crescent crew cricket crocus crop crown crystal cube cuckoo cucumber curtain cushion cutlery cymbal cypress
dagger dairy daisy dancer deacon debate deck delta dentist depot desert desk detour device dew diamond diary dinner diploma
disk ditch diver dock doctor dogma dollar dolphin donkey donor door dove dozen dragon drain drawer dress drill driver drum
duchess duck duel dune dwarf eagle earring echo eclipse editor effort elbow elegy elephant elevator elk embassy ember emblem
emerald emperor empire engine envelope envoy epic epoch equator errand escort essay estate estuary evening exhibit expanse eye
fabric factory falcon family farm fathom faucet feast feather fence fender fern ferret ferry fiber fiddle field figure filter
finch finger firefly flagpole flame flannel flask fleece flint flock flood floor flour flower flute folder foliage font forest
forge fork fossil fountain fowl fox fraction frame freckle freight fresco friar fridge fringe frog frontier fudge fungus
furnace furrow gadget galaxy gallery galley gallon garage garden gargoyle garlic garment garnet gate gazebo gazelle gecko gem
general geyser giraffe glacier glade glider globe glove glue goat goblet goldfish goose gopher gorge gorilla gown grain
granite grape gravel grocer grotto grouse grove guard guide guild guitar gulf gully gutter gymnast habitat hail halo hamlet
hammer hamper hamster handle hangar harbor harness harvest hatchet haven hawk hazel hearth heather hedgehog helmet herald herb
herd hermit heron hickory highway hinge hobby hockey holly honey hoof horizon hornet horse hotel hound hummingbird hunter
hurdle husband hyena hymn iceberg icon igloo iguana income infant ink inlet insect iris island ivy jackal jacket jaguar jail
jam jasmine javelin jaw jelly jersey jester jewel jigsaw jockey journal judge jug jungle juniper jury kangaroo kayak kennel
kernel kettle keyboard kidney kiln kimono kingdom kiosk kitchen kite kitten kiwi knapsack knee knight knob knuckle koala label
ladder ladle lagoon lake lamb lance lantern lapel larch lark lasso latch lattice laundry lava lavender lawn lawyer leather
lectern ledge legend lemon lens leopard lettuce library lichen lilac lily lime linen lizard llama loaf lobby lobster locket
locust lodge logbook lotus lounge lunch lynx lyre machine magnet magpie mailbox mallet mammal mandolin mango manor mansion
mantle maple marble margin marigold market marsh marten mask mason mast mattress mayor maze meadow medal melody melon memoir
mercury mermaid mesa meteor metro midnight mineral minister minnow minute mirror mitten moat model molecule monarch monkey
monsoon monument moon moose morning mortar mosaic motor mound mountain mouse muffin mulberry museum mushroom muskrat mustard
myrtle napkin navy nectar needle nephew newt nickel niece nomad noodle nougat novel nugget nurse nutmeg nylon oasis oboe ocean
ocelot octave octopus office omelet onion opal opera orbit orchard orchestra orchid oregano oriole osprey ostrich ounce
outpost oven oyster paddle padlock page pagoda painter palace palm pamphlet panda panel pansy panther pantry papaya paper
parade parcel parish park parlor parrot parsley parsnip passage pasta pastry path patio pavilion payroll peach peacock peak
peanut pebble pedal pelican pencil penguin peony pepper perch perfume petal petunia pewter pharmacy pheasant phoenix photo
piano pickle picnic picture pier pigeon pillar pillow pilot pioneer pipe pirate pistachio piston pitcher pizza planet plank
plant plaster plateau platter plaza plow plumber pocket podium poem pond pony poplar poppy porch porcupine portal possum
postcard potato pottery pouch powder prairie prince prism prize profit prophet province pudding puddle puffin pulley pulpit
puma pumpkin pupil puppet puppy pyramid python quail quarry quartz queen quill quilt quiver rabbit raccoon radar radio radish
railway raisin rake ramp ranger raven ravine razor recipe reef reindeer relic remedy reptile reservoir resort ribbon rice
riddle rifle rivet robin robot rocket rodeo roof rooster root rosemary rudder ruffle ruin rumor runway rye sabre saddle safari
saffron sailor salad salmon saloon salute sandal sapling sapphire sardine satchel satin sauna sausage savanna saxophone
scaffold scale scallop scarf scepter scholar school schooner science scissors scooter scorpion scout screen scribe scroll
sculptor seal season seat seaweed secretary seed senate sentry sequoia sermon serpent shark sheep shelf shell shelter sheriff
shield ship shore shovel shrimp shrine shrub shutter sibling sickle siding signal silo singer siren sister skate sketch
skillet skunk slate sled sleeve slipper slope sloth smith smoke snail snake soap socket sofa soil soldier sonata song sonnet
soup source spade spaniel sparrow spear sphere spider spinach spire sponge spool spoon spring sprout spruce squash squid
squirrel stable stadium stage stair stallion stamp staple statue steam steel steeple stencil stirrup stomach stone stool stork
story stove strait straw stream street string studio stump suburb suitcase sulphur summer summit sundial sunset surgeon
swallow swamp swan sweater switch sword symbol syrup system tablet tadpole tailor talon tambourine tangerine tank tapestry
target tariff tavern taxi teacher teapot telescope temple tenant terrace theater thicket thimble thistle thread throat throne
thrush thumb thunder ticket tide tiger timber toad toast toffee tomato tongue topaz torch tornado tortoise toucan towel tower
town tractor trader trail train tram trapeze travel tray treasure treaty trellis trench triangle tribe tributary trio trophy
trout truck trumpet trunk truth tuba tugboat tulip tuna tundra tunic tunnel turban turbine turkey turnip turret turtle tuxedo
twig typhoon umbrella uncle uniform union universe urchin utensil vacuum valley valve vampire vanilla vault vehicle veil
vendor veranda vessel viaduct village vinegar vineyard viola violin viper virtue visitor voice volcano voyage vulture waffle
wagon waiter walnut walrus waltz warbler warden wardrobe warehouse warrior wasp watch wave weasel weather weaver wedge weevil
whale wharf wheat wheel whisker whistle widow willow windmill window wine winter wizard wolf wombat workshop worm wreath
wrench wrist yacht yarn yeast yogurt yoke zebra zenith zephyr zinc zipper zodiac zone
""".split()
